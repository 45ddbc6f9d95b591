"""The validator against graphs: a set of ordered lists can run exactly where its graph of needs has no cycle."""

import graphlib
import random
from collections import defaultdict
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.schedule import (
    SCHEDULES,
    Action,
    Schedule,
    ScheduleError,
    channel_of,
    get_schedule,
    needed_capacity,
    place_communication,
    validate,
)
from support.pipe_schedules import shuffled, v_shaped

runnable = st.one_of(
    st.builds(get_schedule, st.sampled_from(list(SCHEDULES)), st.integers(1, 6), st.integers(1, 8)),
    st.builds(v_shaped, st.integers(1, 5), st.integers(1, 9), st.randoms(use_true_random=False)),
)


def _can_run(schedule: Schedule, capacity: int) -> bool:
    """Acyclic: each step after the one before; after what it computes from; messages after room and sending."""
    graph: dict[object, set[object]] = defaultdict(set)
    sends, receives = defaultdict(list), defaultdict(list)
    for rank, steps in enumerate(place_communication(schedule)):
        for before, step in zip((None, *steps), steps, strict=False):
            graph[step] |= {before} if before else set()
            stage, op, i = step
            if op.startswith("SEND"):
                sends[channel_of(step, schedule.placement)].append(step)
            elif op.startswith("RECV"):
                receives[channel_of(step, schedule.placement)].append(step)
            elif op == "W":
                graph[step].add(Action(stage, "I", i))
            else:
                if op != "F":
                    graph[step].add(Action(stage, "F", i))
                if schedule.slices > 1 and op == "F" and i % schedule.slices:
                    graph[step].add(Action(stage, "F", i - 1))
                if schedule.slices > 1 and op == "B" and (i + 1) % schedule.slices:
                    graph[step].add(Action(stage, "B", i + 1))
                origin = stage - 1 if op == "F" else stage + 1
                if not 0 <= origin < schedule.num_stages:
                    continue
                if schedule.placement[origin] != rank:
                    graph[step].add(Action(stage, "RECV_F" if op == "F" else "RECV_B", i))
                elif op == "F":
                    graph[step].add(Action(origin, "F", i))
                else:
                    whole = Action(origin, "B", i)
                    graph[step].add(whole if whole in schedule.ranks[rank] else Action(origin, "I", i))
    for channel, sent in sends.items():
        for k, (send, receive) in enumerate(zip(sent, receives[channel], strict=True)):
            graph[receive].add(send)
            if k >= capacity:
                graph[send].add(receives[channel][k - capacity])
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError:
        return False
    return True


@given(runnable, st.sampled_from([0, 0, 1, 3]), st.integers(1, 3), st.randoms(use_true_random=False))
def test_runs_exactly_where_the_graph_has_no_cycle(
    schedule: Schedule, swaps: int, capacity: int, rng: random.Random
) -> None:
    candidate = shuffled(schedule, swaps, rng)
    with nullcontext() if _can_run(candidate, capacity) else pytest.raises(ScheduleError):
        validate(candidate, capacity=capacity)


@given(runnable)
def test_what_has_run_once_is_valid_with_room_enough(schedule: Schedule) -> None:
    capacity = schedule.num_stages * schedule.units
    facts = validate(schedule, capacity=capacity)
    assert facts.peak_activations == schedule.peak_activations()
    # Played step by step, it is the same.
    assert validate(schedule, capacity=capacity, steps=place_communication(schedule)) == facts


@given(runnable)
def test_needed_capacity_is_the_least_that_will_do(schedule: Schedule) -> None:
    needed = needed_capacity(schedule)
    validate(schedule, capacity=needed)
    if needed > 1:
        with pytest.raises(ScheduleError, match=f"deadlocks with channels of {needed - 1}"):
            validate(schedule, capacity=needed - 1)


def test_needed_capacity_of_what_cannot_run() -> None:
    with pytest.raises(ScheduleError, match="deadlocks"):
        needed_capacity(Schedule.from_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F1,0F0,0B1,0B0", "action 0F1: it comes before the earlier slice 0F0"),
        ("0F0,0F1,0B0,0B1", "action 0B0: it comes before the backward of the later slice 1"),
        ("0F0,0F1,0I1,0W1,0W0,0I0", "action 0W0: it comes before 0I0"),
    ],
)
def test_slices_go_forward_in_order_and_backward_in_reverse(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(Schedule.from_text(text, slices=2))


def test_slices_must_divide_the_units() -> None:
    with pytest.raises(ScheduleError, match="its 3 units are no multiple of 2 slices"):
        Schedule.from_text("0F0,0F1,0F2", slices=2)


def test_a_number_far_out_is_found_missing_without_memory_for_it() -> None:
    with pytest.raises(ScheduleError, match="action 0F1: it is missing"):
        validate(Schedule.from_text("0F0,0F2147483646,0B0"))
    with pytest.raises(ScheduleError, match="beyond 2"):
        Schedule.from_text("0F2147483648")
    with pytest.raises(ScheduleError, match="no rank has an action of stage 1"):
        Schedule.from_text("0F0,2147483647F0")


def test_room_decides_over_a_deadlock() -> None:
    # Rank 0 fills its channel before it receives; rank 1 fills the one back before it receives the rest.
    text = "0F0,0F1,0F2,2F0,2F1,2F2\n1F0,1F1,1F2\n"
    schedule = Schedule.from_text(text)
    steps = [
        [Action.parse(s) for s in line.split()]
        for line in (
            "0F0 0SEND_F0 0F1 0SEND_F1 0F2 0SEND_F2 2RECV_F0 2F0 2RECV_F1 2F1 2RECV_F2 2F2",
            "1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 1RECV_F2 1F2 1SEND_F2",
        )
    ]
    validate(schedule, capacity=1, steps=steps)
    many = Schedule.from_text(
        ",".join([f"0F{i}" for i in range(5)] + [f"2F{i}" for i in range(5)])
        + "\n"
        + ",".join(f"1F{i}" for i in range(5))
    )
    with pytest.raises(ScheduleError) as caught:
        validate(many, capacity=1)
    assert str(caught.value) == (
        "schedule 'custom' deadlocks with channels of 1: "
        "rank 0 waits in 0SEND_F3 for rank 1 to receive an earlier message; "
        "rank 1 waits in 1SEND_F1 for rank 0 to receive an earlier message"
    )
    assert validate(many, capacity=2).messages == {(0, 1, "F"): 5, (1, 0, "F"): 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n1F0", "rank 1, action 1B0: it is missing"),
        ("0F0,0I0\n1F0,1B0", "rank 0, action 0W0: it is missing"),
        ("0F0,0B0,0F1\n1F0,1B0,1F1,1B1", "rank 0, action 0B1: it is missing"),
        ("0F0,0F0,0B0", "rank 0, action 0F0: it is done twice"),
        ("0F0,0B0,0W0", "rank 0, action 0W0: it is done twice, or in halves and whole"),
        ("0F0,0B0\n1B0,1F0", "rank 1, action 1B0: it comes before 1F0"),
        ("0F0,0W0,0I0", "rank 0, action 0W0: it comes before 0I0"),
        ("1F0,0F0,1B0,0B0", "rank 0, action 1F0: it comes before stage 0's output"),
        ("0F0,1F0,0B0,1B0", "rank 0, action 0B0: it comes before stage 1's gradient"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0", "deadlocks .* rank 0 waits in 0RECV_B1 for a message of rank 1"),
    ],
)
def test_faults_name_rank_action_and_reason(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(Schedule.from_text(text))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ("0F0,0B0 | 0F0", "rank 1, action 0F0: stage 0 is placed on rank 0"),
        ("0F0,0B0,0F9 | 1F0,1B0", "action 0F9: there are only 2 stages and 1 micro-batches"),
        ("0F0,0B0,0SEND_F0 | 1F0,1B0", "action 0SEND_F0: a schedule lists compute actions only"),
    ],
)
def test_hand_made_schedules_are_checked(ranks: str, message: str) -> None:
    lists = tuple(tuple(map(Action.parse, rank.split(","))) for rank in ranks.replace(" ", "").split("|"))
    with pytest.raises(ScheduleError, match=message):
        validate(Schedule("x", 2, 1, lists, (0, 1)))


def test_forward_only_runs_nothing_backward() -> None:
    with pytest.raises(ScheduleError, match="rank 0, action 0B0: a forward-only schedule"):
        validate(Schedule("x", 1, 1, ((Action(0, "F", 0), Action(0, "B", 0)),), (0,), forward_only=True))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("0F0 0SEND_F0 0RECV_B0 0B0 | 1RECV_F0 1F0 1B0", "rank 0 waits in 0RECV_B0 for a message of rank 1"),
        ("0F0 0SEND_F0 0B0 | 1RECV_F0 1F0 1B0 1SEND_B0", "rank 0, action 0B0: it comes before 0RECV_B0"),
        ("0SEND_F0 0F0 0RECV_B0 0B0 | 1RECV_F0 1F0 1B0 1SEND_B0", "0SEND_F0: it comes before the value is computed"),
        ("0F0 0SEND_F0 0SEND_F0 0RECV_B0 0B0 | 1RECV_F0 1F0 1B0 1SEND_B0", "action 0SEND_F0: it is sent twice"),
        ("0F0 0SEND_F0 0B0 | 1RECV_F0 1B0 1F0", "rank 1, action 1B0: the schedule has 1F0 in its place"),
        ("0F0 0SEND_F0 0RECV_B0 0B0 | 1RECV_F0 1F0", "rank 1, action 1B0: it is missing from the steps"),
        ("0F0 0SEND_F0 0RECV_B0 0B0 0SEND_B0 | 1RECV_F0 1F0 1B0 1SEND_B0", "0SEND_B0: there is no stage -1"),
        ("0F0 1SEND_B0 0RECV_B0 0B0 | 1RECV_F0 1F0 1B0", "rank 0, action 1SEND_B0: stage 1 is not on this rank"),
        ("0F0 0RECV_B0 0B0", "steps are given for 1 ranks, it has 2"),
    ],
)
def test_faulty_communication_is_found(steps: str, message: str) -> None:
    schedule = get_schedule("1f1b", 2, 1)
    with pytest.raises(ScheduleError, match=message):
        validate(schedule, steps=[[Action.parse(step) for step in rank.split()] for rank in steps.split("|")])


def test_messages_on_a_channel_keep_their_order() -> None:
    schedule = get_schedule("forward_only", 2, 2)
    steps = ["0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F1 1RECV_F0 1F0 1F1"]
    with pytest.raises(ScheduleError, match=r"rank 1, action 1RECV_F1: the next message .* is rank 0's 0SEND_F0"):
        validate(schedule, capacity=2, steps=[[Action.parse(step) for step in rank.split()] for rank in steps])


def test_a_message_that_nobody_receives() -> None:
    schedule = Schedule.from_text("0F0\n1F0\n")
    steps = ["0F0 0SEND_F0", "1F0"]
    with pytest.raises(ScheduleError, match="rank 1, action 1F0: it comes before 1RECV_F0"):
        validate(schedule, steps=[[Action.parse(step) for step in rank.split()] for rank in steps])


def test_channels_hold_at_least_one_message() -> None:
    with pytest.raises(ScheduleError, match="at least 1 message, got 0"):
        validate(get_schedule("1f1b", 2, 2), capacity=0)
