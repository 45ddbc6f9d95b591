"""Placed communication against literal tables and by property."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.schedule import (
    COMPUTE_OPS,
    SCHEDULES,
    Action,
    Schedule,
    ScheduleError,
    channel_of,
    get_schedule,
    place_communication,
)
from support.pipe_schedules import v_shaped


def _text(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, steps)) for steps in place_communication(schedule)]


def test_1f1b_table() -> None:
    assert _text(get_schedule("1f1b", 3, 2)) == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 1RECV_B0 1B0 1SEND_B0 1RECV_B1 1B1 1SEND_B1",
        "2RECV_F0 2F0 2B0 2SEND_B0 2RECV_F1 2F1 2B1 2SEND_B1",
    ]


def test_one_stage_needs_no_messages() -> None:
    assert _text(get_schedule("gpipe", 1, 2)) == ["0F0 0F1 0B0 0B1"]


def test_split_backward_sends_with_i_and_neighbours_on_a_rank_send_nothing() -> None:
    schedule = Schedule.from_text("0F0,3F0,3I0,0I0,3W0,0W0\n1F0,2F0,2I0,1I0,2W0,1W0\n")
    assert _text(schedule) == [
        "0F0 0SEND_F0 3RECV_F0 3F0 3I0 3SEND_B0 0RECV_B0 0I0 3W0 0W0",
        "1RECV_F0 1F0 2F0 2SEND_F0 2RECV_B0 2I0 1I0 1SEND_B0 2W0 1W0",
    ]


def test_messages_needed_out_of_order_are_received_in_the_senders_order() -> None:
    schedule = Schedule.from_text("0F0,0F1,0B1,0B0\n1F1,1B1,1F0,1B0\n")
    assert _text(schedule)[1] == "1RECV_F0 1RECV_F1 1F1 1B1 1SEND_B1 1F0 1B0 1SEND_B0"


schedules = st.one_of(
    st.builds(get_schedule, st.sampled_from(list(SCHEDULES)), st.integers(1, 16), st.integers(1, 64)),
    st.builds(v_shaped, st.integers(1, 8), st.integers(1, 12), st.randoms(use_true_random=False)),
)


@given(schedules)
def test_sends_and_receives_match_in_order_on_every_channel(schedule: Schedule) -> None:
    sends, receives = defaultdict(list), defaultdict(list)
    for rank, steps in enumerate(place_communication(schedule)):
        assert tuple(step for step in steps if step.op in COMPUTE_OPS) == schedule.ranks[rank]
        seen = set()
        for step in steps:
            stage, op, i = step
            if op in COMPUTE_OPS:
                upstream = stage > 0 and schedule.placement[stage - 1] != rank
                downstream = stage < schedule.num_stages - 1 and schedule.placement[stage + 1] != rank
                if op == "F" and upstream:
                    assert (stage, "RECV_F", i) in seen
                if op in "BI" and downstream:
                    assert (stage, "RECV_B", i) in seen
            elif op.startswith("SEND"):
                assert {(stage, made, i) for made in ("F" if op == "SEND_F" else "BI")} & seen
                # What the receiver will call it.
                peer = stage + 1 if op == "SEND_F" else stage - 1
                sends[channel_of(step, schedule.placement)].append((peer, i))
            else:
                receives[channel_of(step, schedule.placement)].append((stage, i))
            seen.add(tuple(step))
    assert sends == receives


@pytest.mark.parametrize(
    ("text", "channel"),
    [("0SEND_F0", (0, 1, "F")), ("1RECV_F0", (0, 1, "F")), ("1SEND_B0", (1, 0, "B")), ("2RECV_B0", (0, 1, "B"))],
)
def test_channels(text: str, channel: tuple[int, int, str]) -> None:
    assert channel_of(Action.parse(text), (0, 1, 1, 0)) == channel


@pytest.mark.parametrize("text", ["0F0", "0SEND_B0", "3SEND_F0", "1SEND_F0", "4RECV_F0"])
def test_no_channel(text: str) -> None:
    with pytest.raises(ScheduleError, match=f"action {text} passes no message"):
        channel_of(Action.parse(text), (0, 1, 1, 0))
