"""Place communication: from compute actions to compute, sends and receives."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
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
from penstock.pipe.schedule.schedule import Schedule, ScheduleError

_SENDS: Final = {
    FORWARD: (SEND_FORWARD, RECEIVE_FORWARD, +1),
    BACKWARD: (SEND_BACKWARD, RECEIVE_BACKWARD, -1),
    INPUT_GRADIENT: (SEND_BACKWARD, RECEIVE_BACKWARD, -1),
}
"""For each op that makes a value for a neighbour: the send, the neighbour's receive, and which neighbour."""
_NEEDS: Final = {FORWARD: RECEIVE_FORWARD, BACKWARD: RECEIVE_BACKWARD, INPUT_GRADIENT: RECEIVE_BACKWARD}
"""For each op that needs a neighbour's value: the receive."""
_PEER: Final = {SEND_FORWARD: +1, RECEIVE_FORWARD: -1, SEND_BACKWARD: -1, RECEIVE_BACKWARD: +1}
"""For each send and receive, the stage at the other end, counted from the action's."""


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


Channels = dict[str, list[Channel | None]]
"""For each send and receive op, the channel of each stage; None at the ends and between stages on one rank."""


def place_communication(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """For each rank, its compute actions with the sends and receives they need.

    A send follows the action that produced the value; a receive stands just before the action that needs it (an
    engine may post it earlier). Messages of one :class:`Channel` are received in the order in which they are sent: an
    action that needs a later message first has the earlier ones received too. Neighbouring stages on the same rank
    hand values over without a message. Weight gradients (W) neither wait nor send.
    """
    channels = channels_of(schedule.placement)
    sent = _receives_by_channel(schedule, channels)
    return tuple(tuple(_with_communication(actions, channels, sent)) for actions in schedule.ranks)


def text_with_communication(schedule: Schedule) -> str:
    """One line per rank, compute, sends and receives separated by commas: PyTorch's ``compute_comms`` form."""
    return "".join(",".join(map(str, steps)) + "\n" for steps in place_communication(schedule))


def channel_of(action: Action, placement: Sequence[int]) -> Channel:
    """The channel that a send or receive uses.

    Raises:
        ScheduleError: The action is no communication, or its stage has no neighbour on another rank there.
    """
    stage, op, _ = action
    peer = stage + _PEER.get(op, 0)
    if not (0 <= stage < len(placement) and 0 <= peer < len(placement)) or placement[peer] == placement[stage]:
        raise ScheduleError(f"action {action} passes no message between ranks with placement {tuple(placement)}")
    here, there = placement[stage], placement[peer]
    return Channel(here, there, op[-1]) if op in (SEND_FORWARD, SEND_BACKWARD) else Channel(there, here, op[-1])


def channels_of(placement: Sequence[int]) -> Channels:
    """The channels between the stages of a placement."""
    onward: list[Channel | None] = [
        Channel(rank, following, "F") if rank != following else None for rank, following in pairwise(placement)
    ]
    back = [Channel(channel.target, channel.source, "B") if channel else None for channel in onward]
    return {
        SEND_FORWARD: [*onward, None],
        RECEIVE_FORWARD: [None, *onward],
        SEND_BACKWARD: [None, *back],
        RECEIVE_BACKWARD: [*back, None],
    }


def _receives_by_channel(schedule: Schedule, channels: Channels) -> dict[Channel, deque[Action]]:
    """For each channel, the receives in the order in which their messages are sent."""
    receives: dict[Channel, deque[Action]] = {}
    for actions in schedule.ranks:
        for stage, op, micro_batch in actions:
            if op not in _SENDS:
                continue
            send, receive, step = _SENDS[op]
            channel = channels[send][stage]
            if channel is not None:
                receives.setdefault(channel, deque()).append(Action(stage + step, receive, micro_batch))
    return receives


def _with_communication(
    actions: Sequence[Action], channels: Channels, sent: dict[Channel, deque[Action]]
) -> Iterator[Action]:
    received_early: set[Action] = set()
    for action in actions:
        stage, op, micro_batch = action
        if op in _NEEDS:
            receive = _NEEDS[op]
            channel = channels[receive][stage]
            if channel is not None:
                needed = Action(stage, receive, micro_batch)
                if needed in received_early:
                    received_early.remove(needed)
                else:
                    yield from _receive_up_to(needed, sent.get(channel, deque()), received_early)
        yield action
        if op in _SENDS:
            send = _SENDS[op][0]
            if channels[send][stage] is not None:
                yield Action(stage, send, micro_batch)


def _receive_up_to(needed: Action, queue: deque[Action], received_early: set[Action]) -> Iterator[Action]:
    while queue and (message := queue.popleft()) != needed:
        received_early.add(message)
        yield message
    # Also where nobody sends it: the validator says so.
    yield needed
