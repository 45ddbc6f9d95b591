"""Prove that a schedule can run."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from penstock.pipe.schedule.action import (
    BACKWARD,
    COMPUTE_OPS,
    FORWARD,
    INPUT_GRADIENT,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    WEIGHT_GRADIENT,
    Action,
)
from penstock.pipe.schedule.communicate import Channel, channels_of, place_communication
from penstock.pipe.schedule.schedule import Schedule, ScheduleError

# What has happened to one micro-batch in one stage, a bit for each. A whole backward sets both of its halves.
_OUTPUT: Final = 1
_INPUT_GRADIENT: Final = 2
_WEIGHT_GRADIENT: Final = 4
_ACTIVATION_HERE: Final = 8
_GRADIENT_HERE: Final = 16
_OUTPUT_SENT: Final = 32
_GRADIENT_SENT: Final = 64

_DONE: Final = {
    FORWARD: _OUTPUT,
    BACKWARD: _INPUT_GRADIENT | _WEIGHT_GRADIENT,
    INPUT_GRADIENT: _INPUT_GRADIENT,
    WEIGHT_GRADIENT: _WEIGHT_GRADIENT,
}
_BLOCKED_SHOWN: Final = 8


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

    Takes time linear in the number of actions.

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
    _check_complete(schedule)
    if steps is None:
        steps = place_communication(schedule)
    else:
        _check_steps(schedule, steps)
    return ScheduleFacts(schedule.peak_activations(), _Play(schedule, steps, capacity).run())


def _fault(schedule: Schedule, rank: int, action: Action, why: str) -> ScheduleError:
    return ScheduleError(f"schedule {schedule.name!r}, rank {rank}, action {action}: {why}")


def _check_complete(schedule: Schedule) -> None:
    micro_batches, num_stages = schedule.micro_batches, schedule.num_stages
    done = bytearray(num_stages * micro_batches)
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            stage, op, micro_batch = action
            if op not in COMPUTE_OPS:
                raise _fault(schedule, rank, action, "a schedule lists compute actions only")
            if not (0 <= stage < num_stages and 0 <= micro_batch < micro_batches):
                raise _fault(
                    schedule, rank, action, f"there are only {num_stages} stages and {micro_batches} micro-batches"
                )
            if schedule.placement[stage] != rank:
                raise _fault(schedule, rank, action, f"stage {stage} is placed on rank {schedule.placement[stage]}")
            if schedule.forward_only and op != FORWARD:
                raise _fault(schedule, rank, action, "a forward-only schedule runs nothing backward")
            at = stage * micro_batches + micro_batch
            if done[at] & _DONE[op]:
                raise _fault(schedule, rank, action, "it is done twice, or in halves and whole")
            done[at] |= _DONE[op]
    wanted = _OUTPUT if schedule.forward_only else _OUTPUT | _INPUT_GRADIENT | _WEIGHT_GRADIENT
    for at, bits in enumerate(done):
        if bits != wanted:
            stage, micro_batch = divmod(at, micro_batches)
            lacking = wanted & ~bits
            op = FORWARD if lacking & _OUTPUT else next(op for op, bit in _DONE.items() if bit == lacking)
            raise _fault(
                schedule,
                schedule.placement[stage],
                Action(stage, op, micro_batch),
                "it is missing from the rank's list",
            )


def _check_steps(schedule: Schedule, steps: Sequence[Sequence[Action]]) -> None:
    """The steps of each rank must be its compute actions with communication of its own stages in between."""
    if len(steps) != schedule.num_ranks:
        raise ScheduleError(
            f"schedule {schedule.name!r}: steps are given for {len(steps)} ranks, it has {schedule.num_ranks}"
        )
    for rank, actions in enumerate(steps):
        compute = iter(schedule.ranks[rank])
        for action in actions:
            stage, op, micro_batch = action
            if op in COMPUTE_OPS:
                expected = next(compute, None)
                if action != expected:
                    raise _fault(schedule, rank, action, f"the schedule has {expected or 'nothing'} in its place")
                continue
            toward = stage + (1 if op in (SEND_FORWARD, RECEIVE_BACKWARD) else -1)
            fits = 0 <= stage < schedule.num_stages and 0 <= micro_batch < schedule.micro_batches
            if not fits or schedule.placement[stage] != rank:
                raise _fault(schedule, rank, action, f"stage {stage} is not on this rank, or has no such micro-batch")
            if not 0 <= toward < schedule.num_stages:
                raise _fault(schedule, rank, action, f"there is no stage {toward} to exchange with")
            if schedule.placement[toward] == rank:
                raise _fault(schedule, rank, action, f"stages {stage} and {toward} share a rank and need no message")
        rest = next(compute, None)
        if rest is not None:
            raise _fault(schedule, rank, rest, "it is missing from the steps")


class _Play:
    """Plays the ranks' steps through bounded channels."""

    def __init__(self, schedule: Schedule, steps: Sequence[Sequence[Action]], capacity: int) -> None:
        self._schedule = schedule
        self._steps = steps
        self._capacity = capacity
        self._state = bytearray(schedule.num_stages * schedule.micro_batches)
        self._next = [0] * schedule.num_ranks
        self._in_flight: dict[Channel, deque[Action]] = {}
        self._passed: dict[Channel, int] = {}
        self._waiting: dict[Channel, int] = {}
        self._channels = channels_of(schedule.placement)

    def run(self) -> dict[Channel, int]:
        """Play to the end; returns the number of messages of each channel."""
        ready = deque(range(self._schedule.num_ranks))
        while ready:
            ready.extend(self._advance(ready.popleft()))
        self._check_finished()
        return self._passed

    def _advance(self, rank: int) -> list[int]:
        """Take steps of one rank until it waits or ends; returns the ranks that can go on because of it."""
        steps = self._steps[rank]
        woken: list[int] = []
        at = self._next[rank]
        while at < len(steps):
            action = steps[at]
            if action.op in COMPUTE_OPS:
                self._compute(rank, action)
            elif action.op in (SEND_FORWARD, SEND_BACKWARD):
                if not self._send(rank, action, woken):
                    break
            elif not self._receive(rank, action, woken):
                break
            at += 1
        self._next[rank] = at
        return woken

    def _compute(self, rank: int, action: Action) -> None:
        schedule, state, m = self._schedule, self._state, self._schedule.micro_batches
        stage, op, micro_batch = action
        at = stage * m + micro_batch
        if op == FORWARD:
            ready = stage == 0 or state[at] & _ACTIVATION_HERE or self._handed_over(stage, stage - 1, at - m, _OUTPUT)
            if not ready:
                raise self._too_early(rank, action, FORWARD, stage - 1)
        elif op == WEIGHT_GRADIENT:
            if not state[at] & _INPUT_GRADIENT:
                raise _fault(schedule, rank, action, f"it comes before {Action(stage, INPUT_GRADIENT, micro_batch)}")
        else:
            if not state[at] & _OUTPUT:
                raise _fault(schedule, rank, action, f"it comes before {Action(stage, FORWARD, micro_batch)}")
            last = stage == schedule.num_stages - 1
            ready = last or state[at] & _GRADIENT_HERE or self._handed_over(stage, stage + 1, at + m, _INPUT_GRADIENT)
            if not ready:
                raise self._too_early(rank, action, "gradient", stage + 1)
        state[at] |= _DONE[op]

    def _handed_over(self, stage: int, neighbour: int, at: int, bit: int) -> bool:
        placement = self._schedule.placement
        return placement[stage] == placement[neighbour] and bool(self._state[at] & bit)

    def _too_early(self, rank: int, action: Action, what: str, neighbour: int) -> ScheduleError:
        receive = RECEIVE_FORWARD if what == FORWARD else RECEIVE_BACKWARD
        if self._channels[receive][action.stage] is not None:
            needed = Action(action.stage, receive, action.micro_batch)
            return _fault(self._schedule, rank, action, f"it comes before {needed}")
        result = "output" if what == FORWARD else "gradient"
        return _fault(
            self._schedule, rank, action, f"it comes before stage {neighbour}'s {result}, made on the same rank"
        )

    def _channel(self, action: Action) -> Channel:
        channel = self._channels[action.op][action.stage]
        assert channel is not None
        return channel

    def _send(self, rank: int, action: Action, woken: list[int]) -> bool:
        stage, op, micro_batch = action
        at = stage * self._schedule.micro_batches + micro_batch
        forward = op == SEND_FORWARD
        made, sent = (_OUTPUT, _OUTPUT_SENT) if forward else (_INPUT_GRADIENT, _GRADIENT_SENT)
        if not self._state[at] & made:
            raise _fault(self._schedule, rank, action, "it comes before the value is computed")
        if self._state[at] & sent:
            raise _fault(self._schedule, rank, action, "it is sent twice")
        channel = self._channel(action)
        queue = self._in_flight.setdefault(channel, deque())
        if len(queue) >= self._capacity:
            self._waiting[channel] = rank
            return False
        self._state[at] |= sent
        queue.append(action)
        self._passed[channel] = self._passed.get(channel, 0) + 1
        self._wake(channel, channel.target, woken)
        return True

    def _receive(self, rank: int, action: Action, woken: list[int]) -> bool:
        stage, op, micro_batch = action
        channel = self._channel(action)
        queue = self._in_flight.setdefault(channel, deque())
        if not queue:
            self._waiting[channel] = rank
            return False
        sent = queue.popleft()
        forward = op == RECEIVE_FORWARD
        expected = (stage - 1 if forward else stage + 1, SEND_FORWARD if forward else SEND_BACKWARD, micro_batch)
        if sent != expected:
            raise _fault(
                self._schedule,
                rank,
                action,
                f"the next message on its channel is rank {channel.source}'s {sent}; messages are received in the "
                "order in which they are sent",
            )
        at = stage * self._schedule.micro_batches + micro_batch
        self._state[at] |= _ACTIVATION_HERE if forward else _GRADIENT_HERE
        self._wake(channel, channel.source, woken)
        return True

    def _wake(self, channel: Channel, rank: int, woken: list[int]) -> None:
        if self._waiting.get(channel) == rank:
            del self._waiting[channel]
            woken.append(rank)

    def _check_finished(self) -> None:
        stuck = [rank for rank, steps in enumerate(self._steps) if self._next[rank] < len(steps)]
        if stuck:
            shown = [self._why_stuck(rank) for rank in stuck[:_BLOCKED_SHOWN]]
            more = f"; and {len(stuck) - len(shown)} more ranks" if len(stuck) > len(shown) else ""
            raise ScheduleError(
                f"schedule {self._schedule.name!r} deadlocks with channels of {self._capacity}: "
                + "; ".join(shown)
                + more
            )
        for channel, queue in self._in_flight.items():
            if queue:
                raise _fault(
                    self._schedule, channel.source, queue[0], f"rank {channel.target} never receives the message"
                )

    def _why_stuck(self, rank: int) -> str:
        action = self._steps[rank][self._next[rank]]
        channel = self._channel(action)
        if action.op in (RECEIVE_FORWARD, RECEIVE_BACKWARD):
            return f"rank {rank} waits in {action} for a message of rank {channel.source}"
        return f"rank {rank} waits in {action} for rank {channel.target} to receive an earlier message"
