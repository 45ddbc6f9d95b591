"""The schedule as a constraint program, for OR-tools' CP-SAT."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from penstock.pipe.schedule.action import FORWARD, Action
from penstock.pipe.schedule.costs import Costs
from penstock.pipe.schedule.problem import Problem
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.simulate import simulate

_TICKS: Final = 1000
"""The longest duration is this many ticks where the costs have no smaller common measure."""
_SEED: Final = 1
_SLACK: Final = 1e-6
"""Divisions may come out a little above or below a whole number."""


@dataclass(frozen=True, slots=True)
class Solved:
    """What the solver found.

    Attributes:
        schedule: The schedule.
        bound: No schedule with these ops is shorter, for the costs in whole ticks.
        exact: Whether the costs are whole ticks, so that nothing was rounded.
        optimal: Whether they are, and the schedule is proved to be one of the shortest with these ops.
    """

    schedule: Schedule
    bound: float
    exact: bool
    optimal: bool


def solve(problem: Problem, seed: Schedule, *, effort_s: float) -> Solved | None:
    """Improve on a schedule.

    Every F, I and W is an interval; those of a rank do not overlap, and what its activations take stays within the
    memory. Micro-batches are alike, so each stage may take them in order without loss. Minimised is the makespan.

    The solver runs on one thread with a fixed seed, and its effort is measured in its own deterministic time, about
    a second each: the same problem gives the same answer with the same version of OR-tools.

    Args:
        problem: What is searched for.
        seed: A schedule that fits, with the problem's ops; the search starts from it.
        effort_s: Deterministic seconds.

    Returns:
        What was found, or None where time ran out first.

    Raises:
        ScheduleError: OR-tools is not installed.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ScheduleError(
            "searching with a solver needs OR-tools: pip install 'penstock[search]'; or search without (solver=False)"
        ) from error
    ticks, exact, tick = _in_ticks(problem)
    times = simulate(seed, _costs_of(ticks))
    model = cp_model.CpModel()
    horizon = round(times.makespan)
    starts: dict[Action, Any] = {}
    on_rank: list[list[Any]] = [[] for _ in range(problem.ranks)]
    for event in times.events():
        stage, op, _ = event.action
        begin = model.new_int_var(0, horizon - ticks.table[op][stage], str(event.action))
        starts[event.action] = begin
        model.add_hint(begin, round(event.start))
        on_rank[event.rank].append(model.new_fixed_size_interval_var(begin, ticks.table[op][stage], ""))
    for intervals in on_rank:
        model.add_no_overlap(intervals)
    for before, after, lag in _orders(problem, ticks):
        model.add(starts[after] >= starts[before] + ticks.table[before.op][before.stage] + lag)
    if problem.limits is not None:
        _limit_memory(model, problem, ticks, starts, horizon)
    makespan = model.new_int_var(0, horizon, "makespan")
    for action, begin in starts.items():
        model.add(makespan >= begin + ticks.table[action.op][action.stage])
    model.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = _SEED
    solver.parameters.max_deterministic_time = effort_s
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    found = {action: solver.value(begin) for action, begin in starts.items()}
    schedule = _ordered(problem, ticks, found)
    if not problem.fits(schedule):
        return None
    return Solved(schedule, solver.best_objective_bound * tick, exact, exact and status == cp_model.OPTIMAL)


@dataclass(frozen=True, slots=True)
class _Ticks:
    table: dict[str, list[int]]
    lags: list[int]


def _in_ticks(problem: Problem) -> tuple[_Ticks, bool, float]:
    """Durations as whole numbers, whether nothing was rounded, and the length of a tick."""
    values = [v for op in problem.ops for v in problem.table[op]] + problem.lags
    least, most = min((v for v in values if v > 0), default=1.0), max(values, default=1.0)
    comparable = most <= _TICKS * least
    parts = next((k for k in range(1, 101) if comparable and all(_is_whole(v / least * k) for v in values)), 0)
    exact = parts > 0
    tick = least / parts if exact else most / _TICKS
    return (
        _Ticks(
            {op: [round(v / tick) for v in problem.table[op]] for op in problem.ops},
            [round(v / tick) for v in problem.lags],
        ),
        exact,
        tick,
    )


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-9


def _costs_of(ticks: _Ticks) -> Costs:
    table = {op: [float(v) for v in values] for op, values in ticks.table.items()}
    return Costs(
        forward=table["F"],
        input_gradient=table.get("I", 0.0),
        weight_gradient=table.get("W", 0.0),
        backward=table.get("B"),
        transfer=[float(lag) for lag in ticks.lags],
    )


def _orders(problem: Problem, ticks: _Ticks) -> list[tuple[Action, Action, int]]:
    """What must come after what, and how much later than its end."""
    back = problem.ops[1]
    last = len(problem.placement) - 1
    orders = []
    for unit in range(problem.micro_batches):
        for stage in range(last):
            orders.append((Action(stage, FORWARD, unit), Action(stage + 1, FORWARD, unit), ticks.lags[stage]))
            orders.append((Action(stage + 1, back, unit), Action(stage, back, unit), ticks.lags[stage]))
        orders.append((Action(last, FORWARD, unit), Action(last, back, unit), 0))
        orders += [
            (Action(stage, a, unit), Action(stage, b, unit), 0)
            for stage in range(last + 1)
            for a, b in pairwise(problem.ops[1:])
        ]
    for unit in range(problem.micro_batches - 1):
        orders += [
            (Action(stage, op, unit), Action(stage, op, unit + 1), 0) for stage in range(last + 1) for op in problem.ops
        ]
    return orders


def _limit_memory(model: Any, problem: Problem, ticks: _Ticks, starts: dict[Action, Any], horizon: int) -> None:
    """From the start of its F to the end of its last op, a micro-batch takes the stage's activations."""
    assert problem.limits is not None
    closing = problem.ops[-1]
    unit = _memory_unit(problem)
    kept: list[tuple[list[Any], list[int]]] = [([], []) for _ in range(problem.ranks)]
    for stage, rank in enumerate(problem.placement):
        for micro_batch in range(problem.micro_batches):
            begin = starts[Action(stage, FORWARD, micro_batch)]
            end = starts[Action(stage, closing, micro_batch)] + ticks.table[closing][stage]
            length = model.new_int_var(0, horizon, "")
            kept[rank][0].append(model.new_interval_var(begin, length, end, ""))
            kept[rank][1].append(math.ceil(problem.weights[stage] / unit - _SLACK))
    for (intervals, demands), limit in zip(kept, problem.limits, strict=True):
        model.add_cumulative(intervals, demands, math.floor(limit / unit + _SLACK))


def _memory_unit(problem: Problem) -> float:
    """A common measure of the stages' activations; where there is none, a small part of the largest.

    Amounts are rounded up to it, and the memory down, so that nothing goes beyond the memory.
    """
    weights = [weight for weight in problem.weights if weight > 0]
    if not weights:
        return 1.0
    if all(weight.is_integer() for weight in weights):
        common = math.gcd(*map(int, weights))
        if max(weights) / common <= 1000 * _TICKS:
            return float(common)
    return max(weights) / _TICKS


def _ordered(problem: Problem, ticks: _Ticks, starts: dict[Action, int]) -> Schedule:
    """Each rank's actions by time; those of no length at one time in the order of a micro-batch's way."""
    last = len(problem.placement) - 1

    def key(action: Action) -> tuple[int, int, int, int]:
        stage, op, unit = action
        way = stage if op == FORWARD else (last + 1) * (1 + problem.ops.index(op)) + last - stage
        return starts[action], starts[action] + ticks.table[op][stage], way, unit

    ranks: list[list[Action]] = [[] for _ in range(problem.ranks)]
    for action in sorted(starts, key=key):
        ranks[problem.placement[action.stage]].append(action)
    return Schedule.from_ranks(ranks, "searched")
