"""Predict when each action of a schedule runs."""

from array import array
from collections import deque
from collections.abc import Sequence
from typing import Final

from penstock.pipe.schedule.action import FORWARD, WEIGHT_GRADIENT, Action
from penstock.pipe.schedule.costs import Costs
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.timeline import Timeline

_NOT_YET: Final = -1.0


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run a schedule in imagination: each rank takes its actions in order, each as soon as its inputs have arrived.

    Messages take ``costs.transfer`` between ranks and nothing within one; they occupy nobody and are never held up, as
    with an engine that posts receives ahead and does not wait for sends. Takes time linear in the number of actions.

    Args:
        schedule: A valid schedule.
        costs: Durations. By default F, I and W take 1 and B takes 2.

    Returns:
        The timeline, which starts at 0.

    Raises:
        ScheduleError: Costs that do not fit the stages, or a rank that would wait for ever.
    """
    costs = costs or Costs()
    return _Simulation(schedule, costs).run()


class _Simulation:
    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        size = schedule.num_stages * schedule.micro_batches
        self._schedule = schedule
        self._durations = costs.table(schedule.num_stages)
        self._activation_lags = _lags(schedule.placement, -1, costs.transfer)
        self._gradient_lags = _lags(schedule.placement, +1, costs.transfer)
        # By stage * micro_batches + micro_batch: when the output and the input gradient are ready, and who waits.
        self._outputs = [_NOT_YET] * size
        self._gradients = [_NOT_YET] * size
        self._awaiting_output = [-1] * size
        self._awaiting_gradient = [-1] * size
        self._starts = tuple(array("d") for _ in schedule.ranks)
        self._ends = tuple(array("d") for _ in schedule.ranks)

    def run(self) -> Timeline:
        ready = deque(range(self._schedule.num_ranks))
        while ready:
            ready.extend(self._advance(ready.popleft()))
        for rank, actions in enumerate(self._schedule.ranks):
            done = len(self._ends[rank])
            if done < len(actions):
                raise ScheduleError(
                    f"schedule {self._schedule.name!r}, rank {rank}, action {actions[done]}: "
                    "it waits for ever for what it needs; validate() tells why"
                )
        return Timeline(self._schedule, self._starts, self._ends)

    def _advance(self, rank: int) -> list[int]:
        """Time the actions of one rank until one has to wait; returns the ranks that can go on because of it."""
        actions, starts, ends = self._schedule.ranks[rank], self._starts[rank], self._ends[rank]
        m = self._schedule.micro_batches
        clock = ends[-1] if ends else 0.0
        woken: list[int] = []
        for at in range(len(ends), len(actions)):
            stage, op, micro_batch = actions[at]
            here = stage * m + micro_batch
            arrival = self._arrival(rank, actions[at], here)
            if arrival == _NOT_YET:
                break
            clock = max(clock, arrival)
            starts.append(clock)
            clock += self._durations[op][stage]
            ends.append(clock)
            if op == FORWARD:
                self._outputs[here] = clock
                waiting = self._awaiting_output
            elif op != WEIGHT_GRADIENT:
                self._gradients[here] = clock
                waiting = self._awaiting_gradient
            else:
                continue
            if waiting[here] >= 0:
                woken.append(waiting[here])
                waiting[here] = -1
        return woken

    def _arrival(self, rank: int, action: Action, here: int) -> float:
        """When what an action needs is on its rank; where that is not known, ``_NOT_YET``, and the rank is noted."""
        stage, op, _ = action
        m = self._schedule.micro_batches
        if op == FORWARD:
            if stage == 0:
                return 0.0
            made, waiting, origin, lag = self._outputs, self._awaiting_output, here - m, self._activation_lags[stage]
        elif op == WEIGHT_GRADIENT:
            return self._gradients[here]
        elif self._outputs[here] == _NOT_YET or stage == self._schedule.num_stages - 1:
            return self._outputs[here]
        else:
            made, waiting, origin, lag = self._gradients, self._awaiting_gradient, here + m, self._gradient_lags[stage]
        if made[origin] == _NOT_YET:
            waiting[origin] = rank
            return _NOT_YET
        return made[origin] + lag


def _lags(placement: Sequence[int], step: int, transfer: float) -> list[float]:
    """For each stage, the time a value takes from the neighbouring stage in direction ``step``."""
    lags = []
    for stage, rank in enumerate(placement):
        neighbour = stage + step
        apart = 0 <= neighbour < len(placement) and placement[neighbour] != rank
        lags.append(transfer if apart else 0.0)
    return lags
