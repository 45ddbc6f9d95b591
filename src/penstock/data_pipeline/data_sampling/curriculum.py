"""How difficult the samples of a step may be: DeepSpeed's curriculum schedules and two more, exact and monotone.

Li, Zhang, He, "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models"
(NeurIPS 2022) and Li et al., "DeepSpeed Data Efficiency" (AAAI 2024) describe them. At step ``s`` of ``T``, between the
smallest difficulty ``a`` and the largest ``b`` with ``difficulty_step`` ``d``, ``fixed_root`` of degree ``r`` gives

    a + (b - a) * (s / T) ** (1 / r), rounded down to a multiple of d,

and ``fixed_linear`` is the same with ``r = 1``. ``cosine`` puts ``(1 - cos(pi * s / T)) / 2`` in the place of the root:
slow at both ends. ``piecewise`` joins given points ``(step, difficulty)`` by straight lines. Three edges of DeepSpeed's
formula are mended here: rounding never goes below ``a`` (with a = 10 and d = 8 it would start at 8), step ``T`` and all
later ones give exactly ``b`` (even if ``b`` is no multiple of ``d``), and the rounding is exact arithmetic (a linear
schedule never misses a multiple by a last bit).
"""

import bisect
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from penstock.data_pipeline.configuration import validate_config

Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True, allow_inf_nan=False)]
Difficulty = int | float

_EXACT_ROOT: Final = 16
"""Root degrees up to this one are compared in exact arithmetic; the numbers in it grow with the degree."""

_NEEDED: Final = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
    "cosine": ("total_curriculum_step", "difficulty_step"),
    "piecewise": ("points",),
    "custom": (),
}
_OPTIONAL: Final = {"piecewise": ("difficulty_step",), "custom": ("total_curriculum_step", "get_difficulty")}

ScheduleType = Literal["fixed_linear", "fixed_root", "fixed_discrete", "cosine", "piecewise", "custom"]


class ScheduleDetails(BaseModel):
    """The ``schedule_config`` of a schedule; which keys are needed depends on the ``schedule_type``.

    Attributes:
        total_curriculum_step: The step from which on the difficulty is the largest.
        difficulty_step: Difficulties are multiples of this (besides the smallest and the largest).
        root_degree: Degree of the root: 2 grows fast at first.
        difficulty: ``fixed_discrete``: the difficulties in turn.
        max_step: ``fixed_discrete``: the last step of each difficulty but the last.
        points: ``piecewise``: pairs of a step and its difficulty, the first at step 0.
        get_difficulty: ``custom``: the function from step to difficulty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    total_curriculum_step: int | None = Field(default=None, ge=1)
    difficulty_step: Number | None = None
    root_degree: Number | None = None
    difficulty: list[Number] | None = None
    max_step: list[int] | None = None
    points: list[tuple[Annotated[int, Field(strict=True, ge=0)], Number]] | None = None
    get_difficulty: Callable[[int], Difficulty] | None = None


class ScheduleConfig(BaseModel):
    """A difficulty schedule, in DeepSpeed's keys.

    Attributes:
        min_difficulty: The difficulty at the start; ``fixed_discrete`` and ``piecewise`` can leave it out.
        max_difficulty: The difficulty at the end; ``fixed_discrete`` and ``piecewise`` can leave it out.
        schedule_type: Which schedule.
        schedule_config: Its details.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_difficulty: Number | None = None
    max_difficulty: Number | None = None
    schedule_type: ScheduleType
    schedule_config: ScheduleDetails = Field(default_factory=ScheduleDetails)

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        given = {name for name, value in self.schedule_config if value is not None}
        needed = set(_NEEDED[self.schedule_type])
        if missing := needed - given:
            raise ValueError(f"a {self.schedule_type} schedule needs schedule_config.{min(missing)}")
        if surplus := given - needed - set(_OPTIONAL.get(self.schedule_type, ())):
            raise ValueError(f"a {self.schedule_type} schedule does not use schedule_config.{min(surplus)}; remove it")
        if self.schedule_type == "fixed_discrete":
            self._check_discrete()
        elif self.schedule_type == "piecewise":
            self._check_points()
        elif self.min_difficulty is None or self.max_difficulty is None:
            raise ValueError(f"a {self.schedule_type} schedule needs min_difficulty and max_difficulty")
        elif self.min_difficulty > self.max_difficulty:
            raise ValueError(
                f"min_difficulty {self.min_difficulty} is above max_difficulty {self.max_difficulty}; exchange them"
            )
        details = self.schedule_config
        for name in ("difficulty_step", "root_degree"):
            value = getattr(details, name)
            if value is not None and value <= 0:
                raise ValueError(f"schedule_config.{name} must be above 0, got {value}")
        return self

    def _check_discrete(self) -> None:
        levels, steps = self.schedule_config.difficulty or [], self.schedule_config.max_step or []
        if len(levels) != len(steps) + 1:
            raise ValueError(
                f"a fixed_discrete schedule needs one max_step fewer than difficulties (the last difficulty stays), "
                f"got {len(levels)} difficulties and {len(steps)} max_steps"
            )
        if any(later < earlier for earlier, later in pairwise(levels)):
            raise ValueError(f"the difficulties of a curriculum never fall, got {levels}")
        if any(later <= earlier for earlier, later in pairwise([-1, *steps])):
            raise ValueError(f"schedule_config.max_step must rise from 0 or more, got {steps}")
        self._check_ends(levels)

    def _check_points(self) -> None:
        points = self.schedule_config.points or []
        if not points or points[0][0] != 0:
            raise ValueError(f"a piecewise schedule needs points (step, difficulty), the first at step 0, got {points}")
        if any(later[0] <= earlier[0] for earlier, later in pairwise(points)):
            raise ValueError(f"the steps of schedule_config.points must rise, got {[step for step, _ in points]}")
        levels = [level for _, level in points]
        if any(later < earlier for earlier, later in pairwise(levels)):
            raise ValueError(f"the difficulties of a curriculum never fall, got {levels}")
        self._check_ends(levels)

    def _check_ends(self, levels: list[int | float]) -> None:
        """What is said of the smallest and the largest difficulty is what the levels say."""
        for name, given, end in (
            ("min_difficulty", self.min_difficulty, levels[0]),
            ("max_difficulty", self.max_difficulty, levels[-1]),
        ):
            if given is not None and given != end:
                raise ValueError(f"{name} is {given}, but the difficulties run from {levels[0]} to {levels[-1]}")


class CurriculumScheduler:
    """The difficulty of each step, a monotone function of the step.

    Args:
        config: A dictionary in DeepSpeed's keys, or a :class:`ScheduleConfig`::

            {"min_difficulty": 8, "max_difficulty": 1024, "schedule_type": "fixed_linear",
             "schedule_config": {"total_curriculum_step": 15000, "difficulty_step": 8}}

    Raises:
        ValueError: A key is unknown or missing, or the numbers contradict each other.
    """

    def __init__(self, config: Mapping[str, Any] | ScheduleConfig) -> None:
        self.config = validate_config(ScheduleConfig, config, "curriculum schedule")
        details = self.config.schedule_config
        levels = details.difficulty or [level for _, level in details.points or []] or [0]
        low, high = self.config.min_difficulty, self.config.max_difficulty
        self.min_difficulty: Difficulty = levels[0] if low is None else low
        self.max_difficulty: Difficulty = levels[-1] if high is None else high
        self._custom = details.get_difficulty
        self._current: Difficulty = self.min_difficulty

    @property
    def last_step(self) -> int | None:
        """The first step from which on the difficulty is the largest; None if a custom schedule does not say."""
        if self.config.schedule_type == "fixed_discrete":
            steps = self.config.schedule_config.max_step
            return steps[-1] + 1 if steps else 0
        if self.config.schedule_config.points is not None:
            return self.config.schedule_config.points[-1][0]
        return self.config.schedule_config.total_curriculum_step

    def get_current_difficulty(self) -> Difficulty:
        """The difficulty of the last :meth:`update_difficulty`; the smallest before the first."""
        return self._current

    def update_difficulty(self, step: int) -> Difficulty:
        """Move to ``step`` (from 0) and return its difficulty."""
        self._current = self.get_difficulty(step)
        return self._current

    def set_current_difficulty(self, difficulty: Difficulty) -> Difficulty:
        """Set the current difficulty, until the next :meth:`update_difficulty`, and return it.

        Raises:
            ValueError: It is not between ``min_difficulty`` and ``max_difficulty``.
        """
        self.load_state_dict({"current_difficulty": difficulty})
        return self._current

    def set_custom_get_difficulty(self, get_difficulty: Callable[[int], Difficulty]) -> None:
        """Give a ``custom`` schedule its function from step to difficulty.

        Raises:
            ValueError: The schedule is not custom.
        """
        if self.config.schedule_type != "custom":
            raise ValueError(
                f"the schedule is {self.config.schedule_type}; only schedule_type 'custom' takes a function"
            )
        self._custom = get_difficulty

    def get_difficulty(self, step: int) -> Difficulty:
        """The difficulty at ``step`` (from 0), without moving there.

        Returns:
            An int where the configuration's numbers are ints, between ``min_difficulty`` and ``max_difficulty``.

        Raises:
            ValueError: The step is negative, or a custom schedule has no function.
        """
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        kind = self.config.schedule_type
        if kind == "custom":
            if self._custom is None:
                raise ValueError(
                    "a custom schedule needs its function: call set_custom_get_difficulty(f) or set "
                    "schedule_config.get_difficulty"
                )
            return min(max(self._custom(step), self.min_difficulty), self.max_difficulty)
        if kind == "fixed_discrete":
            return self._discrete(step)
        if kind == "piecewise":
            return self._piecewise(step)
        return self._rising(step)

    def _discrete(self, step: int) -> Difficulty:
        details = self.config.schedule_config
        levels, steps = details.difficulty or [], details.max_step or []
        return levels[sum(step > last for last in steps)]

    def _piecewise(self, step: int) -> Difficulty:
        details = self.config.schedule_config
        points = details.points or []
        last, level = points[-1]
        if step >= last:
            return level
        place = bisect.bisect_right(points, step, key=lambda point: point[0])
        (start, low), (end, high) = points[place - 1], points[place]
        exact = _exact(low) + (_exact(high) - _exact(low)) * Fraction(step - start, end - start)
        if details.difficulty_step is None:
            whole = all(isinstance(level, int) for _, level in points)
            return math.floor(exact) if whole else float(exact)
        return self._on_grid(math.floor(exact / _exact(details.difficulty_step)))

    def _rising(self, step: int) -> Difficulty:
        details = self.config.schedule_config
        total, grid = details.total_curriculum_step, details.difficulty_step
        assert total is not None
        assert grid is not None
        if step >= total:
            return self.max_difficulty
        low, high, width = _exact(self.min_difficulty), _exact(self.max_difficulty), _exact(grid)
        progress = Fraction(step, total)
        if self.config.schedule_type == "cosine":
            # Half a turn of the cosine, written so that its first steps do not round to nothing.
            risen = math.sin(math.pi / 2 * float(progress)) ** 2
            return self._on_grid(math.floor((low + (high - low) * Fraction(risen)) / width))
        degree = details.root_degree or 1
        level = math.floor((low + (high - low) * Fraction(float(progress) ** (1 / degree))) / width)
        if degree == int(degree) and degree <= _EXACT_ROOT:
            # The float root may be off by a last bit, which counts where it meets a multiple of the grid.
            r, span = int(degree), high - low
            while _power_reaches((level + 1) * width - low, span, progress, r):
                level += 1
            while level * width > low and not _power_reaches(level * width - low, span, progress, r):
                level -= 1
        return self._on_grid(level)

    def _on_grid(self, level: int) -> Difficulty:
        """The ``level``-th multiple of the difficulty step, inside the range of difficulties."""
        grid = self.config.schedule_config.difficulty_step
        assert grid is not None
        rounded = min(max(level * _exact(grid), _exact(self.min_difficulty)), _exact(self.max_difficulty))
        if all(isinstance(number, int) for number in (self.min_difficulty, self.max_difficulty, grid)):
            return int(rounded)
        return float(rounded)

    def get_state(self) -> dict[str, Any]:
        """Same as :meth:`state_dict`."""
        return self.state_dict()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Same as :meth:`load_state_dict`."""
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """The current difficulty, as plain values."""
        return {"current_difficulty": self._current}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: The difficulty is not one of this schedule's.
        """
        current = state.get("current_difficulty")
        if not isinstance(current, int | float) or not self.min_difficulty <= current <= self.max_difficulty:
            raise ValueError(
                f"the difficulty {current!r} is not in this schedule's range of {self.min_difficulty} to "
                f"{self.max_difficulty}; if it comes from a saved state, that was of another schedule"
            )
        self._current = current


def _exact(number: Difficulty) -> Fraction:
    """A number as its decimal digits say: 0.1 is a tenth."""
    return Fraction(number) if isinstance(number, int) else Fraction(repr(number))


def _power_reaches(rise: Fraction, span: Fraction, progress: Fraction, degree: int) -> bool:
    """Whether ``rise <= span * progress ** (1 / degree)``, without taking the root."""
    return rise <= 0 or (span > 0 and (rise / span) ** degree <= progress)
