"""Prove that a schedule can run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.pipe.schedule.action import Action
from penstock.pipe.schedule.actions import B_CODE, F_CODE, I_CODE, W_CODE
from penstock.pipe.schedule.communicate import Channel, place_communication
from penstock.pipe.schedule.graph import NOTHING, Graph, IntArray
from penstock.pipe.schedule.play import Play, check_complete, check_steps
from penstock.pipe.schedule.rounds import run_through
from penstock.pipe.schedule.schedule import Schedule, ScheduleError


@dataclass(frozen=True, slots=True)
class ScheduleFacts:
    """What :func:`validate` found out.

    Attributes:
        peak_activations: For each rank, as :meth:`Schedule.peak_activations` counts.
        messages: For each channel, how many messages pass in a step.
    """

    peak_activations: tuple[int, ...]
    messages: dict[Channel, int]


def validate(
    schedule: Schedule, *, capacity: int = 1, steps: Sequence[Sequence[Action]] | None = None
) -> ScheduleFacts:
    """Prove that a schedule is complete and ordered, that its messages match, and that it cannot deadlock.

    Every micro-batch must pass every stage exactly once forward and, unless ``forward_only``, exactly once backward
    (B, or I and W), on the rank that holds the stage, and every action must come after those it needs. The sends and
    receives are played through with in-order channels that hold ``capacity`` messages: a receive waits for a message,
    a send waits for room. As each rank has a fixed order and each channel one sender and one receiver, whether they
    all get through does not depend on timing, so one play proves it for any.

    Schedules of any size are proved with arrays, in seconds for 1,024 stages and 4,096 micro-batches. One that fails is
    played step by step once more, to word the fault.

    Args:
        schedule: The schedule.
        capacity: Messages that a channel holds before its sender waits; at least 1.
        steps: For each rank, its compute and communication actions in order. By default
            :func:`~penstock.pipe.schedule.communicate.place_communication`'s.

    Raises:
        ScheduleError: The first fault found, with its rank, the action and the reason.
    """
    if capacity < 1:
        raise ScheduleError(f"schedule {schedule.name!r}: channels must hold at least 1 message, got {capacity}")
    if steps is not None:
        check_complete(schedule)
        check_steps(schedule, steps)
        return ScheduleFacts(schedule.peak_activations(), Play(schedule, steps, capacity).run())
    if not (_is_complete(schedule) and _gets_through(schedule, Graph.of(schedule), capacity)):
        check_complete(schedule)
        Play(schedule, place_communication(schedule), capacity).run()
        raise AssertionError(f"schedule {schedule.name!r} was refused, but nothing is wrong with it")
    return ScheduleFacts(schedule.peak_activations(), _messages(schedule))


def needed_capacity(schedule: Schedule) -> int:
    """The least number of messages a channel must hold so that the schedule cannot deadlock.

    Most schedules run with 1. A rank that goes on sending what the receiver takes much later needs more, such as
    breadth-first ones, whose ranks run all micro-batches through one chunk before the next.

    Raises:
        ScheduleError: The schedule cannot run with any capacity; the first fault found.
    """
    enough = schedule.units * schedule.num_stages
    validate(schedule, capacity=enough)
    graph = Graph.of(schedule)
    lacking, tried = 0, 1
    while not _gets_through(schedule, graph, tried):
        lacking, tried = tried, min(2 * tried, enough)
    while tried - lacking > 1:
        middle = (lacking + tried) // 2
        if _gets_through(schedule, graph, middle):
            tried = middle
        else:
            lacking = middle
    return tried


def _is_complete(schedule: Schedule) -> bool:
    """Every unit passes every stage once each way, on the rank that holds the stage."""
    units, stages = schedule.units, schedule.num_stages
    placement = np.array(schedule.placement)
    cells = units * stages
    if schedule.num_actions < cells:
        return False  # Before anything is allocated for what is not there.
    forward, inputs, weights = (np.zeros(cells, dtype=np.bool_) for _ in range(3))
    counted = [0, 0, 0]
    for rank, actions in enumerate(schedule.ranks):
        inside = (actions.stages >= 0) & (actions.stages < stages) & (actions.units >= 0) & (actions.units < units)
        if not inside.all() or not (placement[actions.stages] == rank).all():
            return False
        cell = actions.stages.astype(np.int64) * units + actions.units
        kinds = [cell[actions.ops == code] for code in (F_CODE, B_CODE, I_CODE, W_CODE)]
        for which, (done, parts) in enumerate(
            ((forward, (0,)), (inputs, (B_CODE, I_CODE)), (weights, (B_CODE, W_CODE)))
        ):
            for part in parts:
                done[kinds[part]] = True
                counted[which] += len(kinds[part])
    wanted = cells * (1 - schedule.forward_only)
    # As many as there are cells, and every cell: so each exactly once.
    return counted == [cells, wanted, wanted] and all(
        int(done.sum()) == count for done, count in zip((forward, inputs, weights), counted, strict=True)
    )


def _gets_through(schedule: Schedule, graph: Graph, capacity: int) -> bool:
    """Whether a complete schedule respects what its actions wait for, and its messages get through bounded channels.

    An action counts as done when its message is in the channel. It then waits for the action before it on its rank,
    for the one whose message it takes, and, to have room, until the receiver has taken the message ``capacity`` before
    its own: that happens when the receiver is through with whatever precedes the receive.
    """
    if not _slices_in_order(schedule, graph):
        return False
    # That a stage's F comes before its I or B needs no check: by way of the last stage, I waits for F.
    room = _room(schedule, graph, capacity)
    still = np.zeros(len(graph.ops))
    return bool(np.isfinite(run_through(graph.first, graph.needs, lags=still, durations=still, room=room)).all())


def _slices_in_order(schedule: Schedule, graph: Graph) -> bool:
    if schedule.slices == 1:
        return True
    forward, inputs, _ = (table.reshape(-1, schedule.slices) for table in graph.done_at)
    backward = np.diff(inputs, axis=1) < 0
    return bool((np.diff(forward, axis=1) > 0).all() and (schedule.forward_only or backward.all()))


def _room(schedule: Schedule, graph: Graph, capacity: int) -> IntArray:
    """For each action, the one that must be done before its message finds room in the channel."""
    room = np.full(len(graph.ops), NOTHING, dtype=np.int32)
    rank_of = graph.ranks()
    takes = np.flatnonzero((graph.needs != NOTHING) & (graph.ops != W_CODE)).astype(np.int32)
    takes = takes[rank_of[takes] != rank_of[graph.needs[takes]]]
    if not len(takes):
        return room
    sends = graph.needs[takes]
    # One stream for each direction between two ranks, its messages in the order in which they are sent.
    onward = graph.ops[takes] == F_CODE
    stream = (rank_of[sends].astype(np.int64) * schedule.num_ranks + rank_of[takes]) * 2 + onward
    order = np.lexsort((sends, stream))
    sends, takes, stream = sends[order], takes[order], stream[order]
    borders = np.flatnonzero(np.diff(stream)) + 1
    for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), len(sends)], strict=True):
        if stop - start <= capacity:
            continue
        # A message is received with the first action that takes it or one sent later.
        received = np.minimum.accumulate(takes[start:stop][::-1])[::-1]
        before = received[: stop - start - capacity] - 1
        room[sends[start + capacity : stop]] = np.where(before >= graph.first[rank_of[takes[start]]], before, NOTHING)
    return room


def _messages(schedule: Schedule) -> dict[Channel, int]:
    messages: dict[Channel, int] = {}
    for here, following in zip(schedule.placement, schedule.placement[1:], strict=False):
        if here != following:
            for channel in (Channel(here, following, "F"), Channel(following, here, "B")):
                if channel.direction == "F" or not schedule.forward_only:
                    messages[channel] = messages.get(channel, 0) + schedule.units
    return messages
