"""Play a schedule step by step and say what is wrong with it."""

from collections import deque
from collections.abc import Sequence
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
from penstock.pipe.schedule.communicate import Channel, channels_of
from penstock.pipe.schedule.schedule import Schedule, ScheduleError

# What has happened to one unit in one stage, a bit for each. A whole backward sets both of its halves.
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


def check_complete(schedule: Schedule) -> None:
    """Every unit passes every stage exactly once forward and, unless ``forward_only``, exactly once backward.

    Raises:
        ScheduleError: The first fault found.
    """
    units, num_stages = schedule.units, schedule.num_stages
    done: dict[int, int] = {}
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            stage, op, micro_batch = action
            if not (0 <= stage < num_stages and 0 <= micro_batch < units):
                raise _fault(
                    schedule,
                    rank,
                    action,
                    f"there are only {num_stages} stages and {_counted(schedule)}",
                )
            if schedule.placement[stage] != rank:
                raise _fault(schedule, rank, action, f"stage {stage} is placed on rank {schedule.placement[stage]}")
            if schedule.forward_only and op != FORWARD:
                raise _fault(schedule, rank, action, "a forward-only schedule runs nothing backward")
            at = stage * units + micro_batch
            if done.get(at, 0) & _DONE[op]:
                raise _fault(schedule, rank, action, "it is done twice, or in halves and whole")
            done[at] = done.get(at, 0) | _DONE[op]
    wanted = _OUTPUT if schedule.forward_only else _OUTPUT | _INPUT_GRADIENT | _WEIGHT_GRADIENT
    for at in range(num_stages * units):
        bits = done.get(at, 0)
        if bits != wanted:
            stage, micro_batch = divmod(at, units)
            lacking = wanted & ~bits
            op = FORWARD if lacking & _OUTPUT else next(op for op, bit in _DONE.items() if bit == lacking)
            raise _fault(
                schedule,
                schedule.placement[stage],
                Action(stage, op, micro_batch),
                "it is missing from the rank's list",
            )


def check_steps(schedule: Schedule, steps: Sequence[Sequence[Action]]) -> None:
    """The steps of each rank must be its compute actions with communication of its own stages in between.

    Raises:
        ScheduleError: The first fault found.
    """
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
            fits = 0 <= stage < schedule.num_stages and 0 <= micro_batch < schedule.units
            if not fits or schedule.placement[stage] != rank:
                raise _fault(schedule, rank, action, f"stage {stage} is not on this rank, or has no such micro-batch")
            if not 0 <= toward < schedule.num_stages:
                raise _fault(schedule, rank, action, f"there is no stage {toward} to exchange with")
            if schedule.placement[toward] == rank:
                raise _fault(schedule, rank, action, f"stages {stage} and {toward} share a rank and need no message")
        rest = next(compute, None)
        if rest is not None:
            raise _fault(schedule, rank, rest, "it is missing from the steps")


def _fault(schedule: Schedule, rank: int, action: Action, why: str) -> ScheduleError:
    return ScheduleError(f"schedule {schedule.name!r}, rank {rank}, action {action}: {why}")


def _counted(schedule: Schedule) -> str:
    slices = f" of {schedule.slices} slices" if schedule.slices > 1 else ""
    return f"{schedule.micro_batches} micro-batches{slices}"


class Play:
    """Plays the ranks' steps through channels that hold ``capacity`` messages.

    The plain form of what :func:`~penstock.pipe.schedule.validate.validate` computes with arrays: it is slower, takes
    any sends and receives, and words the fault.
    """

    def __init__(self, schedule: Schedule, steps: Sequence[Sequence[Action]], capacity: int) -> None:
        self._schedule = schedule
        self._steps = steps
        self._capacity = capacity
        self._state = bytearray(schedule.num_stages * schedule.units)
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
        schedule, state, m = self._schedule, self._state, self._schedule.units
        stage, op, micro_batch = action
        at = stage * m + micro_batch
        if op == FORWARD:
            ready = stage == 0 or state[at] & _ACTIVATION_HERE or self._handed_over(stage, stage - 1, at - m, _OUTPUT)
            if not ready:
                raise self._too_early(rank, action, FORWARD, stage - 1)
            if micro_batch % schedule.slices and not state[at - 1] & _OUTPUT:
                raise _fault(
                    schedule, rank, action, f"it comes before the earlier slice {Action(stage, op, micro_batch - 1)}"
                )
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
            if (micro_batch + 1) % schedule.slices and not state[at + 1] & _INPUT_GRADIENT:
                raise _fault(
                    schedule, rank, action, f"it comes before the backward of the later slice {micro_batch + 1}"
                )
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
        at = stage * self._schedule.units + micro_batch
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
        at = stage * self._schedule.units + micro_batch
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
