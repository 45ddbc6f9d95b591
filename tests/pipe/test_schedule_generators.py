"""The built-in schedules against literal tables and the published formulas."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.schedule import Action, Costs, Schedule, get_schedule, simulate, validate

stages = st.integers(1, 16)
micro_batches = st.integers(1, 64)

GPIPE_4_8 = """\
0F0,0F1,0F2,0F3,0F4,0F5,0F6,0F7,0B0,0B1,0B2,0B3,0B4,0B5,0B6,0B7
1F0,1F1,1F2,1F3,1F4,1F5,1F6,1F7,1B0,1B1,1B2,1B3,1B4,1B5,1B6,1B7
2F0,2F1,2F2,2F3,2F4,2F5,2F6,2F7,2B0,2B1,2B2,2B3,2B4,2B5,2B6,2B7
3F0,3F1,3F2,3F3,3F4,3F5,3F6,3F7,3B0,3B1,3B2,3B3,3B4,3B5,3B6,3B7
"""
ONE_F_ONE_B_4_8 = """\
0F0,0F1,0F2,0F3,0B0,0F4,0B1,0F5,0B2,0F6,0B3,0F7,0B4,0B5,0B6,0B7
1F0,1F1,1F2,1B0,1F3,1B1,1F4,1B2,1F5,1B3,1F6,1B4,1F7,1B5,1B6,1B7
2F0,2F1,2B0,2F2,2B1,2F3,2B2,2F4,2B3,2F5,2B4,2F6,2B5,2F7,2B6,2B7
3F0,3B0,3F1,3B1,3F2,3B2,3F3,3B3,3F4,3B4,3F5,3B5,3F6,3B6,3F7,3B7
"""


@pytest.mark.parametrize(
    ("name", "num_stages", "count", "table"),
    [
        ("gpipe", 4, 8, GPIPE_4_8),
        ("gpipe", 1, 3, "0F0,0F1,0F2,0B0,0B1,0B2\n"),
        ("gpipe", 3, 2, "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n2F0,2F1,2B0,2B1\n"),
        ("1f1b", 4, 8, ONE_F_ONE_B_4_8),
        ("1f1b", 1, 3, "0F0,0B0,0F1,0B1,0F2,0B2\n"),
        ("1f1b", 4, 2, "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n2F0,2F1,2B0,2B1\n3F0,3B0,3F1,3B1\n"),
        ("1f1b", 3, 3, "0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1F1,1B0,1F2,1B1,1B2\n2F0,2B0,2F1,2B1,2F2,2B2\n"),
        ("forward_only", 2, 3, "0F0,0F1,0F2\n1F0,1F1,1F2\n"),
    ],
)
def test_literal_table(name: str, num_stages: int, count: int, table: str) -> None:
    schedule = get_schedule(name, num_stages, count)
    assert schedule.to_text() == table
    assert schedule.placement == tuple(range(num_stages))
    assert (schedule.name, schedule.micro_batches) == (name, count)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "forward_only"])
@given(p=stages, m=micro_batches)
def test_every_action_once_on_its_rank(name: str, p: int, m: int) -> None:
    schedule = get_schedule(name, p, m)
    ops = "F" if name == "forward_only" else "FB"
    for rank, actions in enumerate(schedule.ranks):
        assert Counter(actions) == Counter(Action(rank, op, i) for op in ops for i in range(m))


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "forward_only"])
@given(p=stages, m=micro_batches, capacity=st.integers(1, 3))
def test_valid_with_bounded_channels(name: str, p: int, m: int, capacity: int) -> None:
    facts = validate(get_schedule(name, p, m), capacity=capacity)
    per_neighbour = 1 if name == "forward_only" else 2
    assert list(facts.messages.values()) == [m] * (p - 1) * per_neighbour


@given(p=stages, m=micro_batches)
def test_peak_activations_are_the_published_ones(p: int, m: int) -> None:
    assert validate(get_schedule("gpipe", p, m)).peak_activations == (m,) * p
    assert validate(get_schedule("1f1b", p, m)).peak_activations == tuple(min(p - rank, m) for rank in range(p))
    assert validate(get_schedule("forward_only", p, m)).peak_activations == (1,) * p


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@given(p=stages, m=micro_batches, forward=st.integers(1, 9), backward=st.integers(1, 9))
def test_bubble_is_the_published_one(name: str, p: int, m: int, forward: int, backward: int) -> None:
    timeline = simulate(get_schedule(name, p, m), Costs(forward=forward, backward=backward))
    assert timeline.makespan == (m + p - 1) * (forward + backward)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    # The first rank starts first and ends last: its span is the makespan.
    assert timeline.span_bubble_fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule '1f1d'; did you mean '1f1b'\?"):
        get_schedule("1f1d", 2, 2)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "forward_only"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1 stage, got 0"):
        get_schedule(name, 0, 2)
    with pytest.raises(ValueError, match="at least 1 micro-batch, got -1"):
        get_schedule(name, 2, -1)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "forward_only"])
@given(p=stages, m=micro_batches)
def test_text_form_goes_both_ways(name: str, p: int, m: int) -> None:
    schedule = get_schedule(name, p, m)
    assert Schedule.from_text(schedule.to_text(), name) == schedule
