"""The built-in schedules by property, and against the formulas published for them."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.pipe.schedule import (
    SCHEDULES,
    Action,
    Costs,
    Schedule,
    Timeline,
    get_placement,
    get_schedule,
    needed_capacity,
    simulate,
    validate,
)

NAMES = tuple(SCHEDULES)
ranks = st.integers(1, 16)
micro_batches = st.integers(1, 64)
UNIT = Costs()
"""F, I and W take one unit each."""


def _get(name: str, p: int, m: int, v: int) -> Schedule:
    """With v chunks, or v slices, where the schedule has a choice."""
    known = SCHEDULES[name]
    options: dict[str, Any] = {"chunks": v} if known.any_chunks else {"slices": v} if known.sliced else {}
    return get_schedule(name, p, m, **options)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(p=ranks, m=micro_batches, v=st.integers(1, 4))
def test_complete_ordered_and_through_the_smallest_channels(name: str, p: int, m: int, v: int) -> None:
    schedule = _get(name, p, m, v)
    counted = Counter(
        (a.stage, {"B": "IW"}.get(a.op, a.op), a.micro_batch) for actions in schedule.ranks for a in actions
    )
    halves = Counter((s, half, i) for (s, op, i), count in counted.items() for half in op for _ in range(count))
    assert set(halves.values()) == {1}
    assert len(halves) == schedule.num_stages * schedule.units * (3 if SCHEDULES[name].trains else 1)
    assert schedule.num_ranks == p
    # Messages get through channels that hold one, but where a rank runs far ahead with one chunk.
    capacity = 1
    if name == "looped_bfs":
        capacity = max(1, m - p)
    elif name == "interleaved_1f1b":
        capacity = max(1, -(-m // max(1, m // p)) - p + 1)
    facts = validate(schedule, capacity=capacity)
    apart = sum(a != b for a, b in zip(schedule.placement, schedule.placement[1:], strict=False))
    assert sum(facts.messages.values()) == apart * schedule.units * (2 if SCHEDULES[name].trains else 1)
    assert needed_capacity(schedule) <= capacity


def _timeline(name: str, p: int, m: int, v: int = 1, costs: Costs = UNIT) -> Timeline:
    return simulate(_get(name, p, m, v), costs)


def _idle(timeline: Timeline) -> tuple[float, float]:
    """The idle time of a rank, of the makespan and of the longest rank's span."""
    busy = timeline.busy[0]
    assert timeline.busy == (busy,) * len(timeline.busy)
    assert timeline.bubble_fraction == pytest.approx(1 - busy / timeline.makespan, abs=1e-9)
    assert timeline.span_bubble_fraction == pytest.approx(1 - busy / max(timeline.spans), abs=1e-9)
    return timeline.makespan - busy, max(timeline.spans) - busy


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@settings(max_examples=25)
@given(p=ranks, m=micro_batches, forward=st.integers(1, 9), backward=st.integers(1, 9))
def test_bubble_of_gpipe_and_1f1b(name: str, p: int, m: int, forward: int, backward: int) -> None:
    timeline = _timeline(name, p, m, costs=Costs(forward=forward, backward=backward))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    # The first rank starts first and ends last: its span is the makespan.
    assert _idle(timeline) == ((p - 1) * (forward + backward),) * 2


@pytest.mark.parametrize("name", ["looped_bfs", "interleaved_1f1b"])
@settings(max_examples=25)
@given(p=ranks, more=st.integers(0, 48), v=st.integers(1, 4), forward=st.integers(1, 9), backward=st.integers(1, 9))
def test_bubble_of_looped_schedules(name: str, p: int, more: int, v: int, forward: int, backward: int) -> None:
    m = p + more
    timeline = _timeline(name, p, m, v, Costs(forward=forward, backward=backward))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)
    assert _idle(timeline) == ((p - 1) * (forward + backward),) * 2


@settings(max_examples=25)
@given(p=ranks, m=micro_batches, slices=st.integers(1, 4), forward=st.integers(1, 9), backward=st.integers(1, 9))
def test_bubble_of_seq1f1b(p: int, m: int, slices: int, forward: int, backward: int) -> None:
    timeline = _timeline("seq1f1b", p, m, slices, Costs(forward=forward, backward=backward))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m * slices + p - 1), abs=1e-12)
    assert _idle(timeline) == ((p - 1) * (forward + backward),) * 2


@settings(max_examples=25)
@given(p=ranks, m=micro_batches, v=st.integers(1, 4))
def test_bubble_of_forward_only(p: int, m: int, v: int) -> None:
    whole, span = _idle(_timeline("forward_only", p, m, v))
    if v == 1 or m >= p:
        assert (whole, span) == (p - 1, 0)


# Idle time of a rank in units of F = I = W, of the makespan and of the longest rank's span; the fewest micro-batches
# from which on it holds.
SPLIT = {
    "zb_h1": lambda p: (p - 1, p - 1, p),
    "zb_h2": lambda p: (p - 1, 0, 2 * p - 1),
    "zb_v": lambda p: (p - 1, 0, 2 * p - 1),
    "dualpipe_v": lambda p: (p - 1, p - 1, 2 * p),
    "v_half": lambda p: ((3 * p - 5,) * 2 if p > 2 else (2 * (p - 1),) * 2) + (2 * p,),
    "v_min": lambda p: ((4 * p - (3 if p % 3 == 0 else 5),) * 2 if p > 1 else (0, 0)) + (2 * p,),
}


@pytest.mark.parametrize("name", SPLIT)
@settings(max_examples=50)
@given(p=ranks, more=st.integers(0, 48))
def test_bubble_of_split_schedules(name: str, p: int, more: int) -> None:
    whole, span, enough = SPLIT[name](p)
    assert _idle(_timeline(name, p, enough + more)) == (whole, span)


PEAKS = {
    "gpipe": lambda p, m, v: (m,) * p,
    "1f1b": lambda p, m, v: tuple(min(p - r, m) for r in range(p)),
    "looped_bfs": lambda p, m, v: (v * m,) * p,
    "interleaved_1f1b": lambda p, m, v: tuple(
        min(2 * (p - r - 1) + (v - 1) * -(-m // max(1, m // p)) + 1, v * m) for r in range(p)
    ),
    "zb_h1": lambda p, m, v: (min(p, m),) * p,
    "zb_h2": lambda p, m, v: (min(2 * p - 1, m),) * p,
    "seq1f1b": lambda p, m, v: tuple(min(p - r + v - 1, m * v) for r in range(p)),
    "forward_only": lambda p, m, v: (1,) * p,
}
LARGEST_PEAK = {
    "zb_v": lambda p, m: min(2 * p, 2 * m),
    "dualpipe_v": lambda p, m: min(2 * p + 1, 2 * m),
    "v_half": lambda p, m: min(p + 2, 2 * m),
    "v_min": lambda p, m: min(-(-2 * p // 3) + 2, 2 * m),
}


@pytest.mark.parametrize("name", PEAKS)
@settings(max_examples=25)
@given(p=ranks, m=micro_batches, v=st.integers(1, 4))
def test_peak_activations_are_the_published_ones(name: str, p: int, m: int, v: int) -> None:
    assert _get(name, p, m, v).peak_activations() == PEAKS[name](p, m, v)


@pytest.mark.parametrize("name", LARGEST_PEAK)
@settings(max_examples=25)
@given(p=ranks, m=micro_batches)
def test_largest_peak_over_a_v(name: str, p: int, m: int) -> None:
    bound = LARGEST_PEAK[name](p, m)
    found = max(get_schedule(name, p, m).peak_activations())
    assert found <= bound
    if name in ("zb_v", "dualpipe_v") and m >= 2 * p:
        assert found == bound


def test_every_schedule_has_a_formula() -> None:
    assert set(PEAKS) | set(LARGEST_PEAK) == set(NAMES)
    assert {name for name in NAMES if SCHEDULES[name].split} == set(SPLIT)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_built_ins_says_what_they_are(name: str) -> None:
    known = SCHEDULES[name]
    schedule = get_schedule(name, 4, 8)
    assert schedule.num_stages == 4 * known.chunks
    assert (schedule.slices > 1) == known.sliced
    assert any(a.op in "IW" for a in schedule.ranks[0]) == known.split
    assert schedule.forward_only == (not known.trains)
    assert schedule.placement == get_placement("v" if name in LARGEST_PEAK else "loop", 4, known.chunks)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule '1f1d'; did you mean '1f1b'\?"):
        get_schedule("1f1d", 2, 2)
    with pytest.raises(ValueError, match=r"unknown placement 'lop'; did you mean 'loop'\?"):
        get_placement("lop", 2, 2)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1 stage, got 0"):
        get_schedule(name, 0, 2)
    with pytest.raises(ValueError, match="at least 1 micro-batch, got -1"):
        get_schedule(name, 2, -1)
    if SCHEDULES[name].any_chunks:
        with pytest.raises(ValueError, match="at least 1 chunk, got 0"):
            get_schedule(name, 2, 2, chunks=0)


def test_chunks_and_slices_that_a_schedule_cannot_have() -> None:
    with pytest.raises(
        ValueError, match=r"'1f1b' holds 1 stage\(s\) per rank, got chunks=2; any .*: looped_bfs, inter"
    ):
        get_schedule("1f1b", 2, 2, chunks=2)
    with pytest.raises(ValueError, match=r"'zb_v' holds 2 stage\(s\) per rank, got chunks=3"):
        get_schedule("zb_v", 2, 2, chunks=3)
    with pytest.raises(ValueError, match="does not cut micro-batches into slices, got slices=2; these do: seq1f1b"):
        get_schedule("gpipe", 2, 2, slices=2)
    with pytest.raises(ValueError, match="at least 1 slice, got 0"):
        get_schedule("seq1f1b", 2, 2, slices=0)
    assert get_schedule("zb_v", 2, 2, chunks=2, slices=1) == get_schedule("zb_v", 2, 2)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(p=ranks, m=micro_batches, v=st.integers(1, 4))
def test_text_form_goes_both_ways(name: str, p: int, m: int, v: int) -> None:
    schedule = _get(name, p, m, v)
    assert Schedule.from_text(schedule.to_text(), name, slices=schedule.slices) == schedule


def test_actions_are_a_sequence() -> None:
    actions = get_schedule("1f1b", 2, 3).ranks[0]
    listed = [
        Action(0, "F", 0),
        Action(0, "F", 1),
        Action(0, "B", 0),
        Action(0, "F", 2),
        Action(0, "B", 1),
        Action(0, "B", 2),
    ]
    assert list(actions) == listed
    assert actions == tuple(listed)
    assert tuple(listed) == actions
    assert actions != listed
    assert (actions[-1], actions[1:3], len(actions)) == (listed[-1], tuple(listed[1:3]), 6)
    assert hash(actions) == hash(tuple(listed))
    assert Action(0, "B", 1) in actions
    assert actions.index(Action(0, "F", 2)) == 3
    assert repr(actions) == "Actions(0F0,0F1,0B0,0F2,0B1,0B2: 6)"
    with pytest.raises(ValueError, match="read-only"):
        actions.units[0] = 5
