"""Actions and schedules as text."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.schedule import COMMUNICATION_OPS, COMPUTE_OPS, Action, Schedule, ScheduleError


@given(st.integers(0, 9999), st.sampled_from(sorted(COMPUTE_OPS | COMMUNICATION_OPS)), st.integers(0, 9999))
def test_an_action_reads_back(stage: int, op: str, micro_batch: int) -> None:
    assert Action.parse(f"{stage}{op}{micro_batch}") == (stage, op, micro_batch)
    assert str(Action(stage, op, micro_batch)) == f"{stage}{op}{micro_batch}"


@given(st.text(max_size=8))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert Action.parse(str(Action.parse(text))) == Action.parse(text)


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X1", "-1F0", "0F0 1F0", "0SENDF0", "٠F٠"])
def test_malformed_actions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a schedule action"):
        Action.parse(text)


def test_pytorchs_cells_without_compute_are_skipped_and_placement_follows() -> None:
    schedule = Schedule.from_text("0F0,,3F0,3I0,,0I0,3W0,0W0,0REDUCE_GRAD\n,1F0,2F0,,2I0,1I0,2W0,1W0\n", "zb")
    assert schedule.placement == (0, 1, 1, 0)
    assert (schedule.num_stages, schedule.micro_batches, schedule.num_ranks) == (4, 1, 2)
    assert schedule.stages_of(0) == (0, 3)
    assert not schedule.forward_only
    assert schedule.to_text() == "0F0,3F0,3I0,0I0,3W0,0W0\n1F0,2F0,2I0,1I0,2W0,1W0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least 1 stage"),
        ("0F0\n0B0", r"rank 1, action 0B0: stage 0 is on rank 0 already"),
        ("0F0\n2F0", "no rank has an action of stage 1"),
        ("0F0,0SEND_F0\n1F0", "rank 0, action 0SEND_F0: a schedule lists compute actions"),
        ("0F0\n\n1F0", "every rank must hold at least one stage"),
    ],
)
def test_texts_that_are_no_schedule(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_text(text)


def test_placement_must_fit() -> None:
    with pytest.raises(ScheduleError, match="placement lists 1 stages, expected 2"):
        Schedule("x", 2, 1, ((), ()), (0,))
    with pytest.raises(ScheduleError, match=r"ranks \[0, 2\].*ranks 0..1"):
        Schedule("x", 2, 1, ((), ()), (0, 2))
