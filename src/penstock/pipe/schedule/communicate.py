"""Place communication: from compute actions to compute, sends and receives."""

from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from penstock.pipe.schedule.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
)
from penstock.pipe.schedule.schedule import Schedule

GRADIENT_OPS: Final = frozenset({BACKWARD, INPUT_GRADIENT})
"""The ops that need the gradient of the stage's output and yield the gradient of its inputs."""


class Channel(NamedTuple):
    """An in-order stream of messages from one rank to another.

    Attributes:
        source: The pipeline rank that sends.
        target: The pipeline rank that receives.
        direction: ``"F"`` for activations, ``"B"`` for gradients. Each direction is a stream of its own, so that
            neither blocks the other.
    """

    source: int
    target: int
    direction: str


def place_communication(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """For each rank, its compute actions with the sends and receives they need.

    A send follows the action that produced the value; a receive stands just before the action that needs it (an
    engine may post it earlier). Messages of one :class:`Channel` are received in the order in which they are sent: an
    action that needs a later message first has the earlier ones received too. Neighbouring stages on the same rank
    hand values over without a message. Weight gradients (W) neither wait nor send.
    """
    sent = _messages_by_channel(schedule)
    return tuple(tuple(_with_communication(schedule, rank, sent)) for rank in range(schedule.num_ranks))


def output_of(action: Action, placement: tuple[int, ...]) -> tuple[Action, Action, Channel] | None:
    """The message that a compute action gives rise to: its send, its receive and its channel; None if there is none."""
    stage, op, micro_batch = action
    if op == FORWARD:
        to, send, receive, direction = stage + 1, SEND_FORWARD, RECEIVE_FORWARD, "F"
    elif op in GRADIENT_OPS:
        to, send, receive, direction = stage - 1, SEND_BACKWARD, RECEIVE_BACKWARD, "B"
    else:
        return None
    if not 0 <= to < len(placement) or placement[to] == placement[stage]:
        return None
    channel = Channel(placement[stage], placement[to], direction)
    return Action(stage, send, micro_batch), Action(to, receive, micro_batch), channel


def input_of(action: Action, placement: tuple[int, ...]) -> tuple[Action, Channel] | None:
    """The message that a compute action needs: its receive and its channel; None if there is none."""
    stage, op, micro_batch = action
    if op == FORWARD:
        origin, receive, direction = stage - 1, RECEIVE_FORWARD, "F"
    elif op in GRADIENT_OPS:
        origin, receive, direction = stage + 1, RECEIVE_BACKWARD, "B"
    else:
        return None
    if not 0 <= origin < len(placement) or placement[origin] == placement[stage]:
        return None
    return Action(stage, receive, micro_batch), Channel(placement[origin], placement[stage], direction)


def channel_of(action: Action, placement: tuple[int, ...]) -> Channel:
    """The channel that a send or receive uses."""
    stage, op, _ = action
    direction = op[-1]
    step = 1 if direction == "F" else -1
    if op.startswith("SEND"):
        return Channel(placement[stage], placement[stage + step], direction)
    return Channel(placement[stage - step], placement[stage], direction)


def _messages_by_channel(schedule: Schedule) -> dict[Channel, deque[Action]]:
    """For each channel, the receives in the order in which their messages are sent."""
    messages: dict[Channel, deque[Action]] = {}
    for actions in schedule.ranks:
        for action in actions:
            output = output_of(action, schedule.placement)
            if output is not None:
                messages.setdefault(output[2], deque()).append(output[1])
    return messages


def _with_communication(schedule: Schedule, rank: int, sent: dict[Channel, deque[Action]]) -> Iterator[Action]:
    received_early: set[Action] = set()
    for action in schedule.ranks[rank]:
        needed = input_of(action, schedule.placement)
        if needed is not None:
            receive, channel = needed
            if receive in received_early:
                received_early.remove(receive)
            else:
                queue = sent.get(channel, deque())
                while queue and (message := queue.popleft()) != receive:
                    received_early.add(message)
                    yield message
                # Also where nobody sends it: the validator says so.
                yield receive
        yield action
        output = output_of(action, schedule.placement)
        if output is not None:
            yield output[0]
