"""A list scheduler: each rank takes the most urgent of what it can do."""

from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import product
from typing import NamedTuple

from penstock.pipe.schedule.action import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action
from penstock.pipe.schedule.problem import Problem
from penstock.pipe.schedule.schedule import Schedule


class Rule(NamedTuple):
    """What is most urgent.

    Attributes:
        backward_first: Backward passes before forward ones, or after.
        late_first: Of two forward passes the later stage's first, or the earlier one's.
        patience: A weight gradient runs where a rank would else wait for at least this share of its duration.
    """

    backward_first: bool
    late_first: bool
    patience: float


RULES = tuple(Rule(*choice) for choice in product((True, False), (True, False), (0.0, 0.5, 1.0)))


def greedy_schedules(problem: Problem) -> Iterator[Schedule]:
    """A schedule for each rule that leads to one; all fit in the problem's memory."""
    for rule in RULES if problem.split else {rule._replace(patience=0.0) for rule in RULES}:
        made = _Greedy(problem, rule).run()
        if made is not None:
            yield made


def one_at_a_time(problem: Problem) -> Schedule:
    """Each micro-batch forward and back before the next: the schedule that needs the least memory."""
    stages = range(len(problem.placement))
    ranks: list[list[Action]] = [[] for _ in range(problem.ranks)]
    for unit in range(problem.micro_batches):
        for stage in stages:
            ranks[problem.placement[stage]].append(Action(stage, FORWARD, unit))
        for op in problem.ops[1:]:
            for stage in reversed(stages):
                ranks[problem.placement[stage]].append(Action(stage, op, unit))
    return Schedule.from_ranks(ranks, "one_at_a_time")


class _Greedy:
    def __init__(self, problem: Problem, rule: Rule) -> None:
        self._problem, self._rule = problem, rule
        self._back = INPUT_GRADIENT if problem.split else BACKWARD
        count = len(problem.placement)
        self._held = [[s for s in range(count) if problem.placement[s] == r] for r in range(problem.ranks)]
        # For each stage, when the next micro-batches' inputs and gradients are there.
        self._inputs: list[deque[float]] = [deque() for _ in range(count)]
        self._inputs[0].extend([0.0] * problem.micro_batches)
        self._gradients: list[deque[float]] = [deque() for _ in range(count)]
        self._done = {op: [0] * count for op in problem.ops}
        self._waiting: list[deque[Action]] = [deque() for _ in range(problem.ranks)]
        self._clock = [0.0] * problem.ranks
        self._kept = [0.0] * problem.ranks
        # What the stages after a stage on its rank need, so that early ones never take the last of it.
        self._reserve = [
            sum(problem.weights[later] for later in self._held[problem.placement[s]] if later >= s)
            for s in range(count)
        ]
        self._lists: list[list[Action]] = [[] for _ in range(problem.ranks)]

    def run(self) -> Schedule | None:
        """Always the action that can start first; None where memory leaves no way on."""
        problem = self._problem
        heap: list[tuple[float, int, Action]] = []
        for rank in range(problem.ranks):
            self._offer(heap, rank)
        left = len(problem.ops) * len(problem.placement) * problem.micro_batches
        while left:
            if not heap:
                return None
            start, rank, action = heappop(heap)
            if self._choice(rank) != (start, action):
                continue  # Something better has turned up since; it is in the heap too.
            self._take(rank, start, action)
            left -= 1
            neighbours = {
                problem.placement[s] for s in (action.stage - 1, action.stage + 1) if 0 <= s < len(self._inputs)
            }
            for other in {rank, *neighbours}:
                self._offer(heap, other)
        return Schedule.from_ranks(self._lists, "greedy")

    def _offer(self, heap: list[tuple[float, int, Action]], rank: int) -> None:
        choice = self._choice(rank)
        if choice is not None:
            heappush(heap, (choice[0], rank, choice[1]))

    def _choice(self, rank: int) -> tuple[float, Action] | None:
        """What the rank does next, of what is known now, and when."""
        clock, rule = self._clock[rank], self._rule
        best: tuple[float, int, int, Action] | None = None
        for stage in self._held[rank]:
            if self._gradients[stage]:
                start = max(clock, self._gradients[stage][0])
                action = Action(stage, self._back, self._done[self._back][stage])
                found = (start, 0 if rule.backward_first else 1, stage, action)
                best = found if best is None else min(best, found)
            if self._inputs[stage] and self._has_room(rank, stage):
                start = max(clock, self._inputs[stage][0])
                action = Action(stage, FORWARD, self._done[FORWARD][stage])
                found = (start, 1 if rule.backward_first else 0, -stage if rule.late_first else stage, action)
                best = found if best is None else min(best, found)
        if self._waiting[rank]:
            weight = self._waiting[rank][0]
            gap = rule.patience * self._problem.table[WEIGHT_GRADIENT][weight.stage]
            if best is None or (best[0] > clock and best[0] - clock >= gap):
                return clock, weight
        return (best[0], best[3]) if best is not None else None

    def _has_room(self, rank: int, stage: int) -> bool:
        limits = self._problem.limits
        return limits is None or self._kept[rank] + self._reserve[stage] <= limits[rank] * (1 + 1e-9)

    def _take(self, rank: int, start: float, action: Action) -> None:
        problem = self._problem
        stage, op, _ = action
        end = start + problem.table[op][stage]
        self._clock[rank] = end
        self._lists[rank].append(action)
        self._done[op][stage] += 1
        if op == FORWARD:
            self._inputs[stage].popleft()
            self._kept[rank] += problem.weights[stage]
            if stage + 1 < len(self._inputs):
                self._inputs[stage + 1].append(end + problem.lags[stage])
            else:
                self._gradients[stage].append(end)
            return
        if op == WEIGHT_GRADIENT:
            self._waiting[rank].popleft()
        else:
            self._gradients[stage].popleft()
            if stage:
                self._gradients[stage - 1].append(end + problem.lags[stage - 1])
            if op == INPUT_GRADIENT:
                self._waiting[rank].append(action._replace(op=WEIGHT_GRADIENT))
                return
        self._kept[rank] -= problem.weights[stage]
