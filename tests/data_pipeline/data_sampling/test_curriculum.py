import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling import CurriculumScheduler


def config(kind: str, low: float, high: float, **details: Any) -> dict[str, Any]:
    return {"min_difficulty": low, "max_difficulty": high, "schedule_type": kind, "schedule_config": details}


def test_fixed_linear_table() -> None:
    schedule = CurriculumScheduler(config("fixed_linear", 8, 64, total_curriculum_step=7, difficulty_step=8))
    assert [schedule.get_difficulty(step) for step in range(10)] == [8, 16, 24, 32, 40, 48, 56, 64, 64, 64]


def test_fixed_root_table() -> None:
    schedule = CurriculumScheduler(
        config("fixed_root", 0, 10, total_curriculum_step=100, difficulty_step=1, root_degree=2)
    )
    assert [schedule.get_difficulty(step) for step in (0, 1, 3, 4, 25, 49, 99, 100)] == [0, 1, 1, 2, 5, 7, 9, 10]


def test_fixed_discrete_table() -> None:
    schedule = CurriculumScheduler(config("fixed_discrete", 1, 3, difficulty=[1, 2, 3], max_step=[5, 10]))
    assert [schedule.get_difficulty(step) for step in (0, 5, 6, 10, 11, 99)] == [1, 1, 2, 2, 3, 3]
    assert schedule.last_step == 11
    assert CurriculumScheduler({**schedule.config.model_dump(), "min_difficulty": None}).min_difficulty == 1


def test_rounding_starts_at_the_minimum_and_ends_at_the_maximum() -> None:
    # Plain rounding to multiples of 8 would start at 8, below the minimum, and hold 96 at the last step.
    schedule = CurriculumScheduler(config("fixed_linear", 10, 100, total_curriculum_step=10, difficulty_step=8))
    assert [schedule.get_difficulty(step) for step in (0, 1, 9, 10, 11)] == [10, 16, 88, 100, 100]


def test_exact_where_floats_are_not() -> None:
    # In floats 0.29 * 100 is 28.999999999999996 and (0.001 ** (1 / 3)) * 10 is 1.0000000000000002.
    linear = CurriculumScheduler(config("fixed_linear", 0, 100, total_curriculum_step=100, difficulty_step=1))
    assert [linear.get_difficulty(step) for step in range(101)] == list(range(101))
    cubic = CurriculumScheduler(
        config("fixed_root", 0, 10, total_curriculum_step=1000, difficulty_step=1, root_degree=3)
    )
    assert [cubic.get_difficulty(n**3) for n in range(11)] == list(range(11))
    assert [cubic.get_difficulty(n**3 - 1) for n in range(1, 11)] == list(range(10))


schedules = st.tuples(
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(1, 40),
    st.integers(1, 500),
    st.sampled_from([1, 2, 3, 0.5, 1.7]),
)


@given(schedules, st.lists(st.integers(0, 600), min_size=2, max_size=8))
def test_against_the_published_formula(numbers: tuple[int, int, int, int, float], steps: list[int]) -> None:
    low, rise, grid, total, degree = numbers
    high = low + rise
    schedule = CurriculumScheduler(
        config("fixed_root", low, high, total_curriculum_step=total, difficulty_step=grid, root_degree=degree)
    )
    found = [schedule.get_difficulty(step) for step in sorted(steps)]
    assert found == sorted(found)
    assert schedule.get_difficulty(0) == (low if rise or low == high else high)
    assert schedule.get_difficulty(total) == high
    for step, difficulty in zip(sorted(steps), found, strict=True):
        assert isinstance(difficulty, int)
        assert low <= difficulty <= high
        if step < total:
            level = (step / total) ** (1 / degree) * (high - low) + low
            assume(abs(level - round(level)) > 1e-9)  # where floats cannot tell; the exact cases are tested above
            plain = math.floor(level) - math.floor(level) % grid
            assert difficulty == max(plain, low)


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 64))
def test_difficulties_may_be_fractions(low: int, rise: int, total: int) -> None:
    schedule = CurriculumScheduler(
        config("fixed_linear", low / 10, (low + rise) / 10, total_curriculum_step=total, difficulty_step=0.1)
    )
    for step in range(total + 1):
        tenths = Fraction(low) + Fraction(rise * step, total)
        assert schedule.get_difficulty(step) == math.floor(tenths) / 10


def test_custom_function_is_held_between_the_ends() -> None:
    schedule = CurriculumScheduler(config("custom", 2, 10))
    with pytest.raises(ValueError, match="set_custom_get_difficulty"):
        schedule.get_difficulty(0)
    schedule.set_custom_get_difficulty(lambda step: step * step)
    assert [schedule.get_difficulty(step) for step in (0, 2, 3, 4)] == [2, 4, 9, 10]


def test_current_difficulty_and_state() -> None:
    schedule = CurriculumScheduler(config("fixed_linear", 1, 10, total_curriculum_step=9, difficulty_step=1))
    assert schedule.get_current_difficulty() == 1
    assert schedule.update_difficulty(4) == 5
    other = CurriculumScheduler(schedule.config)
    other.load_state_dict(schedule.state_dict())
    assert other.get_current_difficulty() == 5
    with pytest.raises(ValueError, match="range of 1 to 10"):
        other.load_state_dict({"current_difficulty": 11})


LINEAR = {"total_curriculum_step": 10, "difficulty_step": 1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({**config("fixed_linear", 1, 2, **LINEAR), "max_dificulty": 3}, "did you mean 'max_difficulty'"),
        (config("fixed_linear", 3, 2, **LINEAR), "min_difficulty 3 is above max_difficulty 2"),
        (config("fixed_linear", 1, 2, total_curriculum_step=10), "needs schedule_config.difficulty_step"),
        (config("fixed_linear", 1, 2, total_curriculum_step=10, difficulty_step=0), "must be above 0, got 0"),
        (config("fixed_linear", 1, 2, total_curriculum_step=0, difficulty_step=1), "greater than or equal to 1"),
        (config("fixed_linear", 1, 2, **LINEAR, root_degree=2), "does not use schedule_config.root_degree"),
        (config("fixed_root", 1, 2, **LINEAR), "needs schedule_config.root_degree"),
        (config("fixed_cosine", 1, 2), "schedule_type"),
        (config("fixed_discrete", 1, 2, difficulty=[1, 2], max_step=[1, 2]), "got 2 difficulties and 2 max_steps"),
        (config("fixed_discrete", 1, 2, difficulty=[2, 1], max_step=[1]), "never fall"),
        (config("fixed_discrete", 1, 3, difficulty=[1, 2], max_step=[1]), "max_difficulty is 3"),
        (config("fixed_discrete", 1, 3, difficulty=[1, 2, 3], max_step=[4, 4]), "must rise"),
        ({"schedule_type": "fixed_linear", "schedule_config": LINEAR}, "needs min_difficulty and max_difficulty"),
        (config("fixed_linear", 1, float("nan"), **LINEAR), "max_difficulty"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurriculumScheduler(wrong)


def test_other_mistakes_are_named() -> None:
    schedule = CurriculumScheduler(config("fixed_linear", 1, 2, **LINEAR))
    with pytest.raises(ValueError, match="got -1"):
        schedule.get_difficulty(-1)
    with pytest.raises(ValueError, match="only schedule_type 'custom'"):
        schedule.set_custom_get_difficulty(lambda step: step)


def test_deepspeeds_other_names_do_the_same() -> None:
    schedule = CurriculumScheduler(config("fixed_linear", 8, 64, total_curriculum_step=7, difficulty_step=8))
    assert schedule.set_current_difficulty(32) == schedule.get_current_difficulty() == 32
    other = CurriculumScheduler(schedule.config)
    other.set_state(schedule.get_state())
    assert other.get_current_difficulty() == 32
    with pytest.raises(ValueError, match="72 is not in this schedule's range of 8 to 64"):
        schedule.set_current_difficulty(72)


@given(st.integers(0, 50), st.integers(0, 200), st.integers(1, 60), st.integers(1, 9))
def test_cosine_is_its_formula_rounded_down(low: int, rise: int, total: int, grid: int) -> None:
    scheduler = CurriculumScheduler(
        {
            "min_difficulty": low,
            "max_difficulty": low + rise,
            "schedule_type": "cosine",
            "schedule_config": {"total_curriculum_step": total, "difficulty_step": grid},
        }
    )
    found = [scheduler.get_difficulty(step) for step in range(total + 3)]
    assert found == sorted(found)
    assert found[0] == low
    assert set(found[total:]) == {low + rise}
    for step in range(total):
        exact = low + rise * (1 - math.cos(math.pi * step / total)) / 2
        # Where the formula meets a multiple, the last bit decides.
        assert found[step] in {max(low, math.floor((exact + slack) / grid) * grid) for slack in (-1e-9, 1e-9)}


def test_piecewise_joins_its_points_by_lines() -> None:
    points = [[0, 10], [4, 20], [6, 100], [9, 100]]
    scheduler = CurriculumScheduler({"schedule_type": "piecewise", "schedule_config": {"points": points}})
    assert [scheduler.get_difficulty(step) for step in range(8)] == [10, 12, 15, 17, 20, 60, 100, 100]
    assert (scheduler.min_difficulty, scheduler.max_difficulty, scheduler.last_step) == (10, 100, 9)
    details = {"points": [[0, 0.5], [2, 1.0]], "difficulty_step": 0.2}
    scheduler = CurriculumScheduler({"schedule_type": "piecewise", "schedule_config": details})
    assert [scheduler.get_difficulty(step) for step in range(4)] == [0.5, 0.6, 1.0, 1.0]
    constant = CurriculumScheduler({"schedule_type": "piecewise", "schedule_config": {"points": [[0, 7]]}})
    assert constant.get_difficulty(3) == 7
    for wrong, message in (
        ([], "the first at step 0"),
        ([[1, 2]], "the first at step 0"),
        ([[0, 2], [0, 3]], "must rise"),
        ([[0, 2], [1, 1]], "never fall"),
    ):
        with pytest.raises(ValueError, match=message):
            CurriculumScheduler({"schedule_type": "piecewise", "schedule_config": {"points": wrong}})
    with pytest.raises(ValueError, match="does not use schedule_config"):
        CurriculumScheduler({"schedule_type": "piecewise", "schedule_config": {"points": points, "max_step": [1]}})
