"""When each sample enters the pool: any number of difficulty metrics made into one sort key.

A sample is admitted at a step if every metric admits it. Difficulty only grows, so a sample once admitted stays, and
what matters of it is its *entry point*: the latest, over the metrics, of the first step that admits it. Entry points
are quantised to at most 256 *births*, never to an earlier one: no sample appears before its difficulty is allowed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.data_sampling.curriculum import CurriculumScheduler, Difficulty
from penstock.data_pipeline.data_sampling.growing import MAX_BLOCKS
from penstock.data_pipeline.data_sampling.order import IntArray

NEVER: Final = MAX_BLOCKS
"""The block number of samples that no step admits."""


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
        if self.values.dtype.kind == "f" and bool(np.isnan(self.values).any()):
            bad = int(np.isnan(self.values).argmax())
            raise ValueError(f"metric {self.name!r}: sample {bad} has the value NaN; give every sample a number")
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

    def blocks(self, difficulties: Sequence[Difficulty]) -> npt.NDArray[np.int64]:
        """For each sample, the first of ``difficulties`` (rising) that admits it; their number if none does."""
        if self.difficulty_type == "value":
            return np.searchsorted(np.asarray(difficulties), self.values, side="left")
        count = len(self.values)
        admitted = [math.ceil(Fraction(str(percent)) * count / 100) for percent in difficulties]
        order = np.argsort(self.values, kind="stable") if self.order is None else self.order
        result = np.empty(count, dtype=np.int64)
        result[order] = np.searchsorted(np.asarray(admitted), np.arange(count), side="right")
        return result


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


@dataclass(frozen=True)
class EntryPoints:
    """The samples sorted by when they enter the pool.

    Attributes:
        order: Admitted samples, sorted by block and then by number; int64.
        sizes: Samples in each block; none is empty.
        steps: The step at which each block enters.
        never: How many samples no step admits (their metric is above the schedule's largest difficulty).
    """

    order: IntArray
    sizes: list[int]
    steps: list[int]
    never: int


def entry_points(metrics: Sequence[DifficultyMetric]) -> EntryPoints:
    """Sort samples by their entry point over all metrics.

    Raises:
        ValueError: Metrics differ in their number of samples, or the first step admits no sample.
    """
    counts = {metric.name: len(metric.values) for metric in metrics}
    if len(set(counts.values())) != 1:
        raise ValueError(f"every metric needs one value per sample, but they have {counts}")
    steps = birth_steps([metric.scheduler for metric in metrics])
    blocks = np.zeros(next(iter(counts.values())), dtype=np.uint16)
    for metric in metrics:
        found = metric.blocks([metric.scheduler.get_difficulty(step) for step in steps])
        found[found == len(steps)] = NEVER
        np.maximum(blocks, found.astype(np.uint16), out=blocks)
    sizes = np.bincount(blocks, minlength=NEVER + 1)
    if sizes[0] == 0:
        raise ValueError(f"no sample is easy enough for the first step: {_hardest(metrics)}; raise min_difficulty")
    never = int(sizes[NEVER])
    order = np.argsort(blocks, kind="stable")[: len(blocks) - never]
    filled = np.flatnonzero(sizes[: len(steps)])
    return EntryPoints(
        order=order.astype(np.int64, copy=False),
        sizes=sizes[filled].tolist(),
        steps=[steps[block] for block in filled],
        never=never,
    )


def _hardest(metrics: Sequence[DifficultyMetric]) -> str:
    return ", ".join(
        f"{metric.name} starts at {metric.difficulty_type} {metric.scheduler.get_difficulty(0)}"
        + (f" and its smallest value is {metric.values.min()}" if len(metric.values) else "")
        for metric in metrics
    )
