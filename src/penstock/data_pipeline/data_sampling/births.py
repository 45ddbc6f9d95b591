"""When each sample enters the pool: any number of difficulty metrics made into one sort key.

A sample is admitted at a step if every metric admits it. Difficulty only grows, so a sample once admitted stays, and
what matters of it is its *entry point*: the latest, over the metrics, of the first step that admits it. Entry points
are quantised to at most 256 *births*, never to an earlier one: no sample appears before its difficulty is allowed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.data_sampling.curriculum import CurriculumScheduler, Difficulty
from penstock.data_pipeline.data_sampling.growing import MAX_BLOCKS
from penstock.data_pipeline.data_sampling.order import IntArray, digest_of
from penstock.data_pipeline.data_sampling.thresholds import Thresholds, percentile_thresholds, value_thresholds


@dataclass(frozen=True)
class DifficultyMetric:
    """One metric of all samples and its schedule.

    Attributes:
        name: For messages and reports.
        values: The metric of each sample.
        scheduler: The difficulty of each step.
        difficulty_type: ``value``: a step admits samples whose metric is at most the difficulty. ``percentile``: a
            step admits the easiest ``difficulty`` percent of the samples (rounded up; equal values in sample order).
        order: The samples sorted by the metric, where an analyzer has it already; for ``percentile``.
    """

    name: str
    values: npt.NDArray[Any]
    scheduler: CurriculumScheduler
    difficulty_type: Literal["value", "percentile"] = "value"
    order: IntArray | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or self.values.dtype.kind not in "iuf":
            raise ValueError(
                f"metric {self.name!r}: expected one number per sample, got {self.values.dtype} of shape "
                f"{self.values.shape}"
            )
        if self.scheduler.last_step is None:
            raise ValueError(
                f"metric {self.name!r}: a custom schedule needs schedule_config.total_curriculum_step to order samples"
            )
        lowest, highest = self.scheduler.min_difficulty, self.scheduler.max_difficulty
        if self.difficulty_type == "percentile" and not 0 < lowest <= highest <= 100:
            raise ValueError(
                f"metric {self.name!r}: percentiles lie above 0 and up to 100, but the difficulties run from {lowest} "
                f"to {highest}"
            )

    def thresholds(self, difficulties: Sequence[Difficulty]) -> Thresholds:
        """What each of ``difficulties`` (rising) admits."""
        if self.difficulty_type == "value":
            return value_thresholds(self.values, difficulties)
        return percentile_thresholds(self.values, difficulties, self.order)

    def check_numbers(self, part: slice) -> None:
        """Refuse NaN among some of the values, which compares with nothing.

        Raises:
            ValueError: There is one; the message names the sample.
        """
        if self.values.dtype.kind == "f":
            bad = np.isnan(self.values[part])
            if bad.any():
                sample = part.start + int(bad.argmax())
                raise ValueError(f"metric {self.name!r}: sample {sample} has the value NaN; give every sample a number")


def birth_steps(schedulers: Sequence[CurriculumScheduler], limit: int = MAX_BLOCKS) -> list[int]:
    """The steps at which the pool may grow: rising, the first 0, at most ``limit``.

    They are all steps at which any difficulty changes, or, where those are too many, ``limit`` evenly spread steps up
    to the last change; then a sample enters at the first of those that admits it, late by at most that spacing.

    Raises:
        ValueError: A custom schedule falls.
    """
    last = max(scheduler.last_step or 0 for scheduler in schedulers)
    changes: set[int] | None = {0}
    for scheduler in schedulers:
        found = _changes(scheduler, limit)
        changes = None if changes is None or found is None else changes | found
    if changes is not None and len(changes) <= limit:
        return sorted(changes)
    return sorted({math.ceil(Fraction(last * i, limit - 1)) for i in range(limit)})


def _changes(scheduler: CurriculumScheduler, limit: int) -> set[int] | None:
    """The steps whose difficulty differs from the step before; None if there are more than ``limit``."""
    changes: set[int] = set()
    last = scheduler.last_step or 0
    # Halve the range as long as its ends differ: a monotone function that agrees at the ends is constant between.
    ranges = [(0, scheduler.get_difficulty(0), last, scheduler.get_difficulty(last))]
    while ranges:
        low, at_low, high, at_high = ranges.pop()
        if at_low > at_high:
            raise ValueError(
                f"a curriculum never falls, but its difficulty is {at_low} at step {low} and {at_high} at step {high}"
            )
        if at_low == at_high:
            continue
        if high - low == 1:
            changes.add(high)
            if len(changes) > limit:
                return None
            continue
        middle = (low + high) // 2
        at_middle = scheduler.get_difficulty(middle)
        ranges += [(low, at_low, middle, at_middle), (middle, at_middle, high, at_high)]
    return changes


def schedule_identity(scheduler: CurriculumScheduler) -> str:
    """A digest of what a schedule asks for; of a function, what it says at the steps where the pool may grow."""
    if scheduler.config.schedule_type != "custom":
        return digest_of(scheduler.config.model_dump_json())
    steps = birth_steps([scheduler])
    return digest_of("custom", steps, [scheduler.get_difficulty(step) for step in steps])
