"""Drawings against literal pictures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.schedule import Costs, Schedule, ScheduleError, draw, get_schedule, simulate


def _lines(*lines: str) -> str:
    return "".join(line + "\n" for line in lines)


def test_1f1b_of_4_and_8_within_80_columns() -> None:
    assert draw(get_schedule("1f1b", 4, 8), columns=80) == _lines(
        "rank 0 | F0 F1 F2 F3          B0 F4 B1 F5 B2 F6 B3 F7 B4    B5    B6    B7",
        "rank 1 |    F0 F1 F2       B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5    B6    B7",
        "rank 2 |       F0 F1    B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6    B7",
        "rank 3 |          F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    )


def test_long_actions_fill_their_cells() -> None:
    timeline = simulate(get_schedule("gpipe", 2, 2), Costs(forward=1.0, backward=2.0))
    assert draw(timeline) == _lines(
        "rank 0 | F0 F1          B0=== B1===",
        "rank 1 |    F0 F1 B0=== B1===",
    )


def test_several_stages_on_a_rank_are_told_apart() -> None:
    assert draw(Schedule.from_text("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n")) == _lines(
        "rank 0 | 0F0         3F0 3B0         0B0",
        "rank 1 |     1F0 2F0         2B0 1B0",
    )


def test_a_wide_table_is_broken_into_bands() -> None:
    assert draw(get_schedule("gpipe", 2, 3), columns=20) == (
        _lines("rank 0 | F0 F1 F2", "rank 1 |    F0 F1 F2") + "\n" + _lines("rank 0 |    B0 B1 B2", "rank 1 | B0 B1 B2")
    )


@given(
    st.sampled_from(["gpipe", "1f1b", "zb_h1", "seq1f1b", "forward_only"]),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(20, 200),
)
def test_every_action_is_drawn_once_and_in_order_within_the_columns(name: str, p: int, m: int, columns: int) -> None:
    schedule = get_schedule(name, p, m)
    text = draw(schedule, columns=columns)
    drawn: list[list[str]] = [[] for _ in range(p)]
    for line in text.splitlines():
        assert len(line) <= columns
        if line:
            head, _, cells = line.partition("|")
            drawn[int(head.split()[1])] += cells.split()
    assert drawn == [[f"{a.op}{a.micro_batch}" for a in actions] for actions in schedule.ranks]


def test_very_uneven_durations_stay_readable() -> None:
    text = draw(simulate(get_schedule("1f1b", 2, 4), Costs(forward=[1e-9, 1.0], backward=1.0)), columns=10_000)
    assert max(map(len, text.splitlines())) < 400


def test_nonsense_is_refused() -> None:
    with pytest.raises(ScheduleError, match="got 0 and None"):
        draw(get_schedule("1f1b", 2, 2), columns=0)
    with pytest.raises(ScheduleError, match="got 80 and 0"):
        draw(get_schedule("1f1b", 2, 2), columns=80, cell=0)
