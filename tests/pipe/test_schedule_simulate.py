"""The simulator against longest paths computed by relaxation."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.schedule import SCHEDULES, Action, Costs, Schedule, ScheduleError, get_schedule, simulate
from support.pipe_schedules import v_shaped

runnable = st.one_of(
    st.builds(get_schedule, st.sampled_from(list(SCHEDULES)), st.integers(1, 5), st.integers(1, 8)),
    st.builds(v_shaped, st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False)),
)


def _relaxed(schedule: Schedule, durations: dict[str, list[float]], transfer: float) -> dict[Action, float]:
    """Earliest ends: raise them until every action respects the one before it on its rank and what it needs."""
    order = [(rank, at, a) for rank, actions in enumerate(schedule.ranks) for at, a in enumerate(actions)]
    end = {a: 0.0 for _, _, a in order}
    changed = True
    while changed:
        changed = False
        for rank, at, action in order:
            stage, op, i = action
            start = end[schedule.ranks[rank][at - 1]] if at else 0.0
            neighbour = {"F": stage - 1, "B": stage + 1, "I": stage + 1}.get(op, -1)
            if 0 <= neighbour < schedule.num_stages:
                made = [Action(neighbour, o, i) for o in ("F" if op == "F" else "BI")]
                lag = 0.0 if schedule.placement[neighbour] == rank else transfer
                start = max(start, *(end[a] + lag for a in made if a in end))
            if start + durations[op][stage] > end[action]:
                end[action] = start + durations[op][stage]
                changed = True
    return end


@given(runnable, st.randoms(use_true_random=False), st.sampled_from([0.0, 1.0, 5.0]))
def test_ends_are_the_longest_paths(schedule: Schedule, rng: random.Random, transfer: float) -> None:
    durations = {op: [float(rng.randint(0, 7)) for _ in range(schedule.num_stages)] for op in "FIWB"}
    costs = Costs(durations["F"], durations["I"], durations["W"], durations["B"], transfer)
    timeline = simulate(schedule, costs)
    expected = _relaxed(schedule, durations, transfer)
    events = list(timeline.events())
    assert {event.action: event.end for event in events} == expected
    assert all(event.end - event.start == durations[event.action.op][event.action.stage] for event in events)
    assert timeline.makespan == max(expected.values())
    total = sum(durations[action.op][action.stage] for action in expected)
    if timeline.makespan:
        assert timeline.bubble_fraction == pytest.approx(1 - total / (timeline.makespan * schedule.num_ranks))


def test_default_costs_split_a_backward_in_two_forwards() -> None:
    whole = simulate(get_schedule("1f1b", 4, 8))
    assert whole.makespan == 3 * (8 + 3)
    split = simulate(Schedule.from_text("0F0,0I0,0W0\n1F0,1I0,1W0\n"))
    assert [tuple(event)[2:] for event in split.events()] == [(0, 1), (3, 4), (4, 5), (1, 2), (2, 3), (3, 4)]


def test_transfer_is_paid_between_ranks_only() -> None:
    vee = Schedule.from_text("0F0,3F0\n1F0,2F0\n")
    assert simulate(vee, Costs(transfer=10.0)).makespan == 4 + 2 * 10


def test_transfers_may_differ_between_pairs_of_stages() -> None:
    schedule = get_schedule("forward_only", 3, 1)
    assert simulate(schedule, Costs(transfer=[2.0, 5.0])).makespan == 3 + 7
    with pytest.raises(ScheduleError, match="given for 3 pairs of neighbouring stages, the schedule has 2"):
        simulate(schedule, Costs(transfer=[1.0, 1.0, 1.0]))


def test_longest_span_leaves_out_the_ramps_of_a_forward_only_run() -> None:
    timeline = simulate(get_schedule("forward_only", 4, 8))
    assert timeline.spans == (8.0,) * 4
    assert timeline.span_bubble_fraction == 0.0
    assert timeline.bubble_fraction == pytest.approx(3 / 11)
    assert timeline.peak_activations == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (Costs(forward=[1.0]), "costs of F are given for 1 stages, the schedule has 2"),
        (Costs(backward=-1.0), "cost of B in stage 0 must be finite and not negative, got -1.0"),
        (Costs(weight_gradient=[1.0, float("nan")]), "cost of W in stage 1 must be finite"),
        (Costs(transfer=float("inf")), "transfer time must be finite"),
    ],
)
def test_costs_are_checked(costs: Costs, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        simulate(get_schedule("1f1b", 2, 2), costs)


def test_a_schedule_that_waits_for_ever_is_named() -> None:
    with pytest.raises(ScheduleError, match="rank 0, action 0B0: it waits for ever"):
        simulate(Schedule.from_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n"))
