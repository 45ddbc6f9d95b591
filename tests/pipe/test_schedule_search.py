"""The search against exhaustive enumeration, and against the built-in schedules."""

import json
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.pipe.schedule import (
    SCHEDULES,
    Costs,
    Problem,
    Schedule,
    ScheduleError,
    get_schedule,
    load_schedule,
    needed_capacity,
    peak_memory,
    save_schedule,
    search,
    simulate,
)

pytest.importorskip("ortools")


@cache
def _orders(micro_batches: int, ops: str) -> tuple[str, ...]:
    """Every order of one stage's ops in which no micro-batch has a later op done before an earlier one."""

    def grow(done: tuple[int, ...]) -> Iterator[str]:
        if done == (micro_batches,) * len(ops):
            yield ""
        for at, op in enumerate(ops):
            if done[at] < (done[at - 1] if at else micro_batches):
                for rest in grow((*done[:at], done[at] + 1, *done[at + 1 :])):
                    yield op + rest

    return tuple(grow((0,) * len(ops)))


def _makespan(orders: tuple[str, ...], durations: list[dict[str, float]], lag: float, count: int) -> float:
    """One stage per rank, each op's micro-batches in order: ends by going round until nothing is left; inf if stuck."""
    ends: dict[tuple[int, str, int], float] = {}
    at, done = [0] * len(orders), [dict.fromkeys("FIWB", 0) for _ in orders]
    clocks = [0.0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                op = order[at[rank]]
                i = done[rank][op]
                if op == "F":
                    need = (rank - 1, "F", i) if rank else None
                elif op == "W":
                    need = (rank, "I", i)
                else:
                    need = (rank + 1, op, i) if rank + 1 < len(orders) else (rank, "F", i)
                if need is not None and need not in ends:
                    break
                arrival = 0.0 if need is None else ends[need] + (lag if need[0] != rank else 0.0)
                clocks[rank] = max(clocks[rank], arrival) + durations[rank][op]
                ends[rank, op, i] = clocks[rank]
                done[rank][op] += 1
                at[rank] += 1
                moved = True
    complete = all(a == len(order) for a, order in zip(at, orders, strict=True))
    return max(clocks) if complete else float("inf")


def _peak(order: str) -> int:
    kept = [0]
    for op in order:
        kept.append(kept[-1] + {"F": 1, "W": -1, "B": -1}.get(op, 0))
    return max(kept)


def _optimum(durations: list[dict[str, float]], lag: float, count: int, memory: float | None, ops: str) -> float:
    orders = [order for order in _orders(count, ops) if memory is None or _peak(order) <= memory]
    return min(_makespan(chosen, durations, lag, count) for chosen in product(orders, repeat=len(durations)))


durations = st.integers(1, 5).map(float)


@settings(max_examples=12)
@example(shape=(2, 3), costs=[[1.0] * 3] * 3, lag=0.0, memory=1, split=True)
@example(shape=(2, 3), costs=[[3.0, 1.0, 5.0], [1.0, 4.0, 2.0], [1.0] * 3], lag=1.0, memory=2, split=True)
@example(shape=(2, 3), costs=[[0.3, 0.1, 0.7], [0.2, 0.4, 0.2], [1.0] * 3], lag=0.1, memory=None, split=True)
@given(
    shape=st.sampled_from([(2, 2), (3, 2), (2, 3)]),
    costs=st.lists(st.lists(durations, min_size=3, max_size=3), min_size=3, max_size=3),
    lag=st.sampled_from([0.0, 1.0, 2.5]),
    memory=st.sampled_from([None, 1, 2]),
    split=st.booleans(),
)
def test_the_optimum_of_small_cases_is_found_and_proved(
    shape: tuple[int, int], costs: list[list[float]], lag: float, memory: int | None, split: bool
) -> None:
    p, m = shape
    f, i, w = ([stage[op] for stage in costs[:p]] for op in range(3))
    table = [{"F": f[r], "I": i[r], "W": w[r], "B": i[r] + w[r]} for r in range(p)]
    expected = _optimum(table, lag, m, memory, "FIW" if split else "FB")
    problem = Problem(tuple(range(p)), m, Costs(f, i, w, transfer=lag), memory=memory, split=split)
    assert problem.bound() <= expected + 1e-9
    found = search(problem)
    assert found.timeline.makespan == pytest.approx(expected, rel=1e-12)
    assert found.optimal
    assert found.bound == pytest.approx(expected, rel=1e-9)
    assert problem.fits(found.schedule)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any placement, costs and memory that one micro-batch fits into."""
    p = draw(st.integers(1, 4))
    placement = draw(
        st.sampled_from(
            [tuple(range(p)), tuple(range(p)) * 2, (*range(p), *reversed(range(p))), (*range(p), p - 1, 0, *range(p))]
        )
    )
    count = len(placement)
    values = st.lists(st.floats(0.0, 3.0), min_size=count, max_size=count)
    weights = [1.0 + 0.5 * (stage % 3) for stage in range(count)]
    least = max(sum(w for w, r in zip(weights, placement, strict=True) if r == rank) for rank in range(p))
    memory = draw(st.sampled_from([None, 1.0, 1.7, 3.0]))
    return Problem(
        placement,
        draw(st.integers(1, 6)),
        Costs(draw(values), draw(values), draw(values), transfer=draw(st.sampled_from([0.0, 0.2]))),
        memory=None if memory is None else memory * least,
        activations=weights,
        split=draw(st.booleans()),
    )


@settings(max_examples=30)
@given(problems(), st.sampled_from([False, False, False, True]))
def test_what_is_found_runs_fits_and_is_no_longer_than_a_built_in(problem: Problem, solver: bool) -> None:
    actions = len(problem.ops) * len(problem.placement) * problem.micro_batches
    found = search(problem, solver=solver and actions <= 60, effort_s=0.2)
    schedule = found.schedule
    needed_capacity(schedule)
    assert (schedule.placement, schedule.micro_batches) == (problem.placement, problem.micro_batches)
    assert problem.fits(schedule)
    assert found.timeline.makespan == simulate(schedule, problem.costs).makespan
    assert found.bound <= found.timeline.makespan + 1e-9
    chunks = len(problem.placement) // problem.ranks
    for name, known in SCHEDULES.items():
        if not known.trains or known.sliced or not (known.any_chunks or known.chunks == chunks):
            continue
        built_in = get_schedule(name, problem.ranks, problem.micro_batches, chunks)
        allowed = problem.split or not known.split
        if built_in.placement == problem.placement and problem.fits(built_in) and allowed:
            assert found.timeline.makespan <= simulate(built_in, problem.costs).makespan
            assert found.built_in is not None


def test_the_solver_beats_the_built_ins_under_tight_memory_and_says_the_same_again() -> None:
    problem = Problem((0, 1, 2, 2, 1, 0), 4, memory=4)
    found, again = search(problem, effort_s=5), search(problem, effort_s=5)
    assert found.built_in == "v_min"
    assert found.built_in_makespan is not None
    assert found.timeline.makespan < found.built_in_makespan
    assert (found.origin, found.schedule.name) == ("solver", "searched")
    assert found.schedule == again.schedule


def test_a_large_problem_is_left_to_the_list_scheduler() -> None:
    costs = Costs([1.0, 1.0, 1.0, 2.5], [1.0, 1.0, 1.0, 2.0], [0.9, 0.9, 0.9, 1.5], transfer=0.1)
    problem = Problem((0, 1, 2, 3), 200, costs, memory=6)
    found = search(problem)
    assert found.origin in ("greedy", *SCHEDULES)
    assert found.timeline.makespan <= 1.02 * problem.bound()
    assert max(peak_memory(found.schedule)) <= 6


def test_the_result_is_saved_with_what_it_was_made_for(tmp_path: Path) -> None:
    problem = Problem((0, 1), 3, Costs(transfer=0.5), memory=2)
    found = search(problem, effort_s=1)
    save_schedule(found.schedule, tmp_path / "mine.json", found.notes(problem))
    assert load_schedule(tmp_path / "mine.json") == found.schedule
    notes = json.loads((tmp_path / "mine.json").read_text())["notes"]
    assert notes["costs"] == {"F": [1, 1], "I": [1, 1], "W": [1, 1], "B": [2, 2], "transfer": [0.5]}
    assert (notes["memory"], notes["makespan"]) == (2, found.timeline.makespan)


def test_bytes_and_their_peak() -> None:
    schedule = Schedule.from_text("0F0,1F0,1I0,0F1,1W0,0I0,0W0,1F1,1B1,0B1")
    # F0 of both, then 0F1; W0 of stage 1 frees 5.
    assert peak_memory(schedule, [3.0, 5.0]) == (11.0,)
    assert peak_memory(schedule) == (3.0,)
    assert schedule.peak_activations() == (3,)


def test_whole_backwards_that_are_cheaper_than_halves_are_no_proof() -> None:
    found = search(Problem((0, 1), 2, Costs(1.0, 1.0, 1.0, backward=1.5)), effort_s=1)
    assert not found.optimal
    assert found.bound <= found.timeline.makespan <= 7
    assert search(Problem((0,), 2, Costs(1.0, 1.0, 1.0, backward=1.5)), effort_s=1).timeline.makespan == 5


def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ScheduleError, match="one micro-batch alone keeps 6 on rank 1, the memory is 5; allow at least 6"
    ):
        Problem((0, 1, 1), 4, memory=5, activations=[1.0, 2.0, 4.0])
    with pytest.raises(ScheduleError, match=r"must use every rank from 0 on, got \(0, 2\)"):
        Problem((0, 2), 4)
    with pytest.raises(ScheduleError, match="costs of activations are given for 1 stages, the schedule has 2"):
        Problem((0, 1), 4, activations=[1.0])
    with pytest.raises(ScheduleError, match="effort above 0 seconds, got 0"):
        search(Problem((0, 1), 4), effort_s=0)
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    tight = Problem((0, 1), 4, Costs(transfer=1.0), memory=1)
    assert tight.fits(search(tight, solver=False).schedule)
    with pytest.raises(ScheduleError, match=r"pip install 'penstock\[search\]'"):
        search(tight)
