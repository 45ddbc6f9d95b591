"""What may run before the step before is validated: literal tables, and properties of every schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.program import Program
from penstock.pipe.schedule import SCHEDULES, Action, Schedule, get_schedule, head_start

TRAINING = [name for name, known in SCHEDULES.items() if known.trains and not known.sliced]


def test_a_triangle_of_forward_passes() -> None:
    for name in ("1f1b", "zb_h1", "zb_h2", "gpipe"):
        found = head_start(get_schedule(name, 4, 8))
        assert found == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)}
    assert head_start(get_schedule("1f1b", 4, 2)) == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)}
    assert head_start(get_schedule("1f1b", 1, 2)) == frozenset()


def test_a_pass_behind_something_else_waits() -> None:
    ranks = ["0F0,0B0,0F1,0B1", "1F0,1B0,1F1,1B1", "2F0,2B0,2F1,2B1"]
    assert head_start(Schedule.from_text("\n".join(ranks))) == {(0, 0), (1, 0)}
    # Stage 0 begins with micro-batch 1, which stage 1 takes second: it has nothing to begin with.
    turned = ["0F1,0B1,0F0,0B0", "1F0,1B0,1F1,1B1", "2F0,2B0,2F1,2B1"]
    assert head_start(Schedule.from_text("\n".join(turned))) == {(0, 1)}


@pytest.mark.parametrize("rank", range(3))
def test_what_is_sent_in_a_part_is_received_in_it(rank: int) -> None:
    schedule = get_schedule("zb_h1", 3, 4)
    head, rest = Program.of(schedule, rank).divided(head_start(schedule))
    text = [
        "0F0,0SEND_F0,0F1",
        "1RECV_F0,1F0",
        "",
    ]
    assert ",".join(str(action) for action, _ in head.steps) == text[rank]
    assert not rank or rest.steps[0][0] == (Action(1, "SEND_F", 0) if rank == 1 else Action(2, "RECV_F", 0))


@given(st.sampled_from(TRAINING), st.integers(1, 6), st.integers(1, 12))
def test_every_schedule_is_divided_into_matching_parts(name: str, ranks: int, micro_batches: int) -> None:
    schedule = get_schedule(name, ranks, micro_batches)
    head = head_start(schedule)
    parts = [Program.of(schedule, rank).divided(head) for rank in range(ranks)]
    for rank, two in enumerate(parts):
        whole = Program.of(schedule, rank)
        assert sorted(map(str, (a for part in two for a, _ in part.steps))) == sorted(str(a) for a, _ in whole.steps)
        # Apart from sends, which may only be put off, the order is the program's.
        kept = [
            [a for a, _ in steps if not a.op.startswith("SEND")] for steps in (whole.steps, two[0].steps, two[1].steps)
        ]
        assert kept[0] == kept[1] + kept[2]
    for number in range(2):
        counts: dict[object, set[int]] = {}
        for two in parts:
            for channel, count in two[number].messages.items():
                counts.setdefault(channel, set()).add(count)
        assert all(len(both) == 1 for both in counts.values())
