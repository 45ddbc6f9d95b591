"""The kept length as a function of the run's clock, and the layer-tokens that come of it."""

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.random_ltd.config import RandomLTDConfig

_Counts = npt.NDArray[np.int64]


def kept_length(config: RandomLTDConfig, clock: int) -> int | None:
    """The kept length at a place of the clock (a step, or tokens read); None where every token is kept.

    From the minimum to the maximum, linear or with a root of the progress, rounded down to a multiple. These are
    DeepSpeed's formulas with two repairs: rounding never goes below the minimum, and the maximum is reached in time
    even when it is not a multiple of ``seq_per_step``.
    """
    pace = config.random_ltd_schedule.schedule_config
    if not config.enabled or clock < pace.start or (pace.end is not None and clock >= pace.end):
        return None
    return int(_growth(config, np.array([clock]))[0])


class PlannedTokens:
    """Layer-tokens of a run of whole sequences, by step.

    Args:
        config: The section.
    """

    def __init__(self, config: RandomLTDConfig) -> None:
        self._config = config

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step reads."""
        return self._config.global_batch_size * self._config.full_length

    def of_step(self, kept: int | None) -> int:
        """Layer-tokens of a step in which the dropping layers keep so many of each sequence; None is all."""
        config = self._config
        kept = config.full_length if kept is None else kept
        whole_layers = config.total_layer_num - config.random_ltd_layer_num
        return config.global_batch_size * (kept * config.random_ltd_layer_num + config.full_length * whole_layers)

    def before(self, step: int) -> int:
        """Layer-tokens of the steps ``0 .. step - 1``."""
        at = bisect_right(self._begins, step) - 1
        return self._sums[at] + (step - self._begins[at]) * self._per_step[at]

    def kept_at(self, step: int) -> int | None:
        """The kept length at a step; None is all."""
        return kept_length(self._config, step * self._clock_per_step)

    def distinct(self) -> list[int]:
        """The kept lengths that occur, the whole sequence's among them if it does, in order."""
        return sorted({self._config.full_length if one is None else one for one in map(self.kept_at, self._begins)})

    @cached_property
    def _begins(self) -> list[int]:
        """Steps from which on the kept length may be another than before, the first of them 0; in order."""
        schedule = self._config.random_ltd_schedule
        pace = schedule.schedule_config
        start, rest = self._first_step(pace.start), self._first_step(pace.start + pace.required)
        ends = [] if pace.end is None else [self._first_step(pace.end)]
        low, high, unit = schedule.min_value, schedule.max_value, pace.seq_per_step
        # For each length above the minimum the first step that keeps it, by bisection: there may be 10^9 steps.
        lengths = np.append(np.arange(low - low % unit + unit, high, unit), high)
        below, reached = np.full_like(lengths, start - 1), np.full_like(lengths, rest)
        while (reached - below > 1).any():
            middle = (below + reached) // 2
            enough = _growth(self._config, middle * self._clock_per_step) >= lengths
            below, reached = np.where(enough, below, middle), np.where(enough, middle, reached)
        return sorted({0, start, *ends, *reached.tolist()})

    @cached_property
    def _per_step(self) -> list[int]:
        """Layer-tokens of each step from a beginning to the next."""
        return [self.of_step(self.kept_at(step)) for step in self._begins]

    @cached_property
    def _sums(self) -> list[int]:
        """Layer-tokens before each beginning."""
        counts = (
            (end - begin) * one for (begin, end), one in zip(pairwise(self._begins), self._per_step, strict=False)
        )
        return list(accumulate(counts, initial=0))

    @property
    def _clock_per_step(self) -> int:
        return self.tokens_per_step if self._config.random_ltd_schedule.schedule_config.by_tokens else 1

    def _first_step(self, clock: int) -> int:
        """The first step at or after a place of the clock."""
        return -(-clock // self._clock_per_step)


def _growth(config: RandomLTDConfig, clock: _Counts) -> _Counts:
    """The kept length at each place of the clock, as if tokens were dropped from the beginning and to the end."""
    schedule = config.random_ltd_schedule
    low, high, pace = schedule.min_value, schedule.max_value, schedule.schedule_config
    since = np.clip(clock - pace.start, 0, pace.required)
    if pace.root_degree is None:
        grown = since * (high - low) // pace.required
    else:
        grown = np.floor((since / pace.required) ** (1.0 / pace.root_degree) * (high - low)).astype(np.int64)
    kept = low + grown
    return np.where(since == pace.required, high, np.maximum(low, kept - kept % pace.seq_per_step))
