"""Search for a schedule."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from penstock.pipe.schedule.action import BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from penstock.pipe.schedule.greedy import greedy_schedules, one_at_a_time
from penstock.pipe.schedule.memory import peak_memory
from penstock.pipe.schedule.names import SCHEDULES, get_schedule
from penstock.pipe.schedule.problem import Problem
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.simulate import simulate
from penstock.pipe.schedule.solver import solve
from penstock.pipe.schedule.timeline import Timeline

MOST_SOLVED: Final = 1500
"""Actions up to which the solver is asked; it is a matter of minutes beyond."""
MOST_GREEDY: Final = 200_000
"""Actions up to which the list scheduler is tried; it is a matter of minutes beyond."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Attributes:
        timeline: The shortest schedule found, called ``searched`` unless a built-in is not beaten, and its times.
        origin: Who found it: ``solver``, ``greedy``, ``one_at_a_time`` or the name of a built-in schedule.
        built_in: The best built-in schedule that fits; None where none has this placement or fits.
        built_in_makespan: Its makespan.
        bound: No schedule for this problem is shorter.
        optimal: Whether the schedule is proved to be one of the shortest.
    """

    timeline: Timeline
    origin: str
    built_in: str | None
    built_in_makespan: float | None
    bound: float
    optimal: bool

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return self.timeline.schedule

    def notes(self, problem: Problem) -> dict[str, Any]:
        """What to keep with the schedule in its file."""
        return {
            "origin": self.origin,
            "makespan": self.timeline.makespan,
            "bound": self.bound,
            "optimal": self.optimal,
            "built_in": self.built_in,
            "built_in_makespan": self.built_in_makespan,
            "costs": {**problem.table, "transfer": problem.lags},
            "memory": problem.memory,
            "activations": problem.weights,
            "peak_memory": list(peak_memory(self.schedule, problem.weights)),
        }


def search(problem: Problem, *, effort_s: float = 20.0, solver: bool = True) -> Found:
    """The shortest schedule that can be found for a problem, never longer than a built-in one that fits.

    Tried are the built-in schedules with this placement, a list scheduler under several rules, and for up to
    :data:`MOST_SOLVED` actions OR-tools' CP-SAT, which starts from the best of them. Beyond :data:`MOST_GREEDY` actions
    only the built-in ones are compared, and one that can do with any memory. The same problem gives the same answer
    with the same version of OR-tools, see :func:`~penstock.pipe.schedule.solver.solve`.

    Args:
        problem: What is searched for.
        effort_s: How long the solver may take, in its deterministic time of about seconds.
        solver: False leaves the solver out.

    Raises:
        ScheduleError: ``solver`` where OR-tools is not installed, or no effort.
    """
    if not effort_s > 0:
        raise ScheduleError(f"a search needs an effort above 0 seconds, got {effort_s}")
    actions = len(problem.ops) * len(problem.placement) * problem.micro_batches
    tried: list[tuple[str, Timeline]] = [
        (schedule.name, simulate(schedule, problem.costs)) for schedule in _built_ins(problem) if problem.fits(schedule)
    ]
    built_in = min(tried, key=_makespan, default=None)
    serial = one_at_a_time(problem)
    candidates = [serial]
    if actions <= MOST_GREEDY:
        candidates += greedy_schedules(problem)
    tried += [(schedule.name, simulate(schedule, problem.costs)) for schedule in candidates]
    best = min(tried, key=_makespan)
    bound, proved = problem.bound(), False
    if solver and actions <= MOST_SOLVED and best[1].makespan > bound * (1 + 1e-12):
        seeds = [_with_ops(problem, timeline.schedule) for _, timeline in tried]
        seed = min(seeds, key=lambda schedule: simulate(schedule, problem.costs).makespan)
        solved = solve(problem, seed, effort_s=effort_s)
        if solved is not None:
            best = min(best, ("solver", simulate(solved.schedule, problem.costs)), key=_makespan)
            # The solver splits every pass. What it proves holds for all where that costs nothing.
            if not problem.split or problem.halves_cost_no_more:
                proved = solved.optimal
                bound = max(bound, solved.bound) if solved.exact else bound
    origin, timeline = best
    if origin in ("solver", "greedy", "one_at_a_time"):
        timeline = replace(timeline, schedule=replace(timeline.schedule, name="searched"))
    return Found(
        timeline=timeline,
        origin=origin,
        built_in=built_in[0] if built_in else None,
        built_in_makespan=built_in[1].makespan if built_in else None,
        bound=min(bound, timeline.makespan),
        optimal=proved or timeline.makespan <= problem.bound() * (1 + 1e-12),
    )


def _makespan(tried: tuple[str, Timeline]) -> float:
    return tried[1].makespan


def _built_ins(problem: Problem) -> Iterator[Schedule]:
    """The built-in schedules with the problem's placement and ops."""
    chunks = -(-len(problem.placement) // problem.ranks)
    for name, known in SCHEDULES.items():
        right_chunks = known.any_chunks or known.chunks == chunks
        if known.trains and not known.sliced and right_chunks and (problem.split or not known.split):
            schedule = get_schedule(name, problem.ranks, problem.micro_batches, chunks)
            if schedule.placement == problem.placement:
                yield schedule


def _with_ops(problem: Problem, schedule: Schedule) -> Schedule:
    """The schedule with the problem's ops: each B as I and W where passes may be split."""
    if not problem.split:
        return schedule
    halves = (INPUT_GRADIENT, WEIGHT_GRADIENT)
    ranks = [
        [
            a
            for action in actions
            for a in ([action._replace(op=h) for h in halves] if action.op == BACKWARD else [action])
        ]
        for actions in schedule.ranks
    ]
    return Schedule.from_ranks(ranks, schedule.name)
