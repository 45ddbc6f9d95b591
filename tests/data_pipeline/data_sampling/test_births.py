import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling.births import DifficultyMetric, birth_steps
from penstock.data_pipeline.data_sampling.curriculum import CurriculumScheduler
from penstock.data_pipeline.data_sampling.entry_points import entry_points


def linear(low: float, high: float, total: int, grid: float = 1) -> CurriculumScheduler:
    return CurriculumScheduler(
        {
            "min_difficulty": low,
            "max_difficulty": high,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": total, "difficulty_step": grid},
        }
    )


def custom(function: Any, low: float, high: float, total: int) -> CurriculumScheduler:
    details = {"total_curriculum_step": total, "get_difficulty": function}
    return CurriculumScheduler(
        {"min_difficulty": low, "max_difficulty": high, "schedule_type": "custom", "schedule_config": details}
    )


def entry_step(metrics: list[DifficultyMetric], sample: int, steps: list[int]) -> int | None:
    """By definition: the first of the steps at which every metric admits the sample."""
    for step in steps:
        admitted = True
        for metric in metrics:
            difficulty = metric.scheduler.get_difficulty(step)
            if metric.difficulty_type == "value":
                admitted &= bool(metric.values[sample] <= difficulty)
            else:
                rank = sum((value, i) < (metric.values[sample], sample) for i, value in enumerate(metric.values))
                admitted &= rank < math.ceil(Fraction(str(difficulty)) * len(metric.values) / 100)
        if admitted:
            return step
    return None


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=30),
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([4, 256]),
)
def test_entry_points_by_definition(pairs: list[tuple[int, int]], total: int, other_total: int, limit: int) -> None:
    lengths, ranks = (np.array(column) for column in zip(*pairs, strict=True))
    metrics = [
        DifficultyMetric("length", lengths, linear(20, 20, 1) if limit == 4 else linear(0, 18, total)),
        DifficultyMetric("rarity", ranks / 7, linear(12.5, 100, other_total, 12.5), "percentile"),
    ]
    steps = birth_steps([metric.scheduler for metric in metrics])
    expected = [entry_step(metrics, sample, steps) for sample in range(len(pairs))]
    if 0 not in expected:
        with pytest.raises(ValueError, match="raise min_difficulty"):
            entry_points(metrics)
        return
    found = entry_points(metrics)
    entered = [step for step, size in zip(found.steps, found.sizes, strict=True) for _ in range(size)]
    assert entered == [expected[sample] for sample in found.order.tolist()]
    assert entered == sorted(entered)
    assert found.never == expected.count(None)
    assert sorted(found.order.tolist()) == [sample for sample, step in enumerate(expected) if step is not None]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(2, 64))
def test_births_are_all_changes_or_an_even_grid(total: int, levels: int, limit: int) -> None:
    scheduler = linear(0, levels, total)
    changes = [s for s in range(1, total + 1) if scheduler.get_difficulty(s) != scheduler.get_difficulty(s - 1)]
    births = birth_steps([scheduler], limit)
    assert len(births) <= limit
    if len(changes) + 1 <= limit:
        assert births == [0, *changes]
    else:
        assert births[0] == 0
        assert births[-1] == total
        assert max(np.diff(births)) <= math.ceil(total / (limit - 1))


def test_several_schedules_share_the_births() -> None:
    assert birth_steps([linear(0, 2, 10), linear(0, 5, 20)]) == [0, 4, 5, 8, 10, 12, 16, 20]


def test_a_billion_step_schedule_is_quick_to_plan() -> None:
    births = birth_steps([linear(0, 10**9, 10**9)])
    assert len(births) == 256
    assert births[-1] == 10**9


def test_mistakes_are_named() -> None:
    values = np.array([5, 6])
    with pytest.raises(ValueError, match="never falls, but its difficulty is 9 at step 0 and 1 at step 8"):
        birth_steps([custom(lambda step: 9 - step, 0, 9, 8)])
    scheduler = CurriculumScheduler({"min_difficulty": 0, "max_difficulty": 1, "schedule_type": "custom"})
    with pytest.raises(ValueError, match="a custom schedule needs schedule_config"):
        DifficultyMetric("m", values, scheduler)
    with pytest.raises(ValueError, match="m starts at value 4 and its smallest value is 5; raise min_difficulty"):
        entry_points([DifficultyMetric("m", values, linear(4, 6, 10))])
    with pytest.raises(ValueError, match=r"they have \{'m': 2, 'n': 3\}"):
        entry_points(
            [DifficultyMetric("m", values, linear(5, 6, 1)), DifficultyMetric("n", np.ones(3), linear(1, 1, 1))]
        )
    with pytest.raises(ValueError, match="sample 1 has the value NaN"):
        entry_points([DifficultyMetric("m", np.array([0, np.nan]), linear(4, 6, 10))])
    with pytest.raises(ValueError, match="percentiles lie above 0"):
        DifficultyMetric("m", values, linear(0, 6, 10), "percentile")
    with pytest.raises(ValueError, match="the difficulties run from 5 to 101"):
        DifficultyMetric("m", values, linear(5, 101, 10), "percentile")
    with pytest.raises(ValueError, match="one number per sample"):
        DifficultyMetric("m", np.array(["a"]), linear(0, 6, 10))
