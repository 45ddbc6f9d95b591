"""The kept length as a function of the run's clock, and the layer-tokens that come of it."""

from functools import cached_property

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
    if not config.enabled:
        return None
    kept = int(_kept_lengths(config, np.array([clock]))[0])
    return None if kept < 0 else kept


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
        growing = min(step, len(self._sums) - 1)
        last = self.of_step(self.kept_at(len(self._sums) - 1))
        return int(self._sums[growing]) + max(step - growing, 0) * last

    def kept_at(self, step: int) -> int | None:
        """The kept length at a step; None is all."""
        by_tokens = self._config.random_ltd_schedule.schedule_config.by_tokens
        return kept_length(self._config, step * self.tokens_per_step if by_tokens else step)

    def distinct(self) -> list[int]:
        """The kept lengths that occur, the whole sequence's among them if it does, in order."""
        kept = {self._config.full_length if one is None else one for one in map(self.kept_at, self._changes)}
        return sorted(kept)

    @cached_property
    def _changing_steps(self) -> int:
        """Steps until the kept length has come to rest."""
        pace = self._config.random_ltd_schedule.schedule_config
        clock = max(pace.start + pace.required, pace.end or 0) if self._config.enabled else 0
        return -(-clock // self.tokens_per_step) if pace.by_tokens else clock

    @cached_property
    def _lengths(self) -> _Counts:
        steps = np.arange(self._changing_steps, dtype=np.int64)
        by_tokens = self._config.random_ltd_schedule.schedule_config.by_tokens
        kept = _kept_lengths(self._config, steps * self.tokens_per_step if by_tokens else steps)
        return np.where(kept < 0, self._config.full_length, kept)

    @property
    def _changes(self) -> list[int]:
        """Steps at which the kept length is another than before."""
        changes = np.flatnonzero(np.diff(self._lengths)) + 1
        return [0, *changes.tolist(), self._changing_steps]

    @cached_property
    def _sums(self) -> _Counts:
        config = self._config
        whole_layers = config.total_layer_num - config.random_ltd_layer_num
        per_step = self._lengths * config.random_ltd_layer_num + config.full_length * whole_layers
        return np.concatenate(([0], np.cumsum(per_step * config.global_batch_size)))


def _kept_lengths(config: RandomLTDConfig, clock: _Counts) -> _Counts:
    """The kept length at each place of the clock, -1 where every token is kept."""
    schedule = config.random_ltd_schedule
    low, high, pace = schedule.min_value, schedule.max_value, schedule.schedule_config
    since = np.clip(clock - pace.start, 0, pace.required)
    if pace.root_degree is None:
        grown = since * (high - low) // pace.required
    else:
        grown = np.floor((since / pace.required) ** (1.0 / pace.root_degree) * (high - low)).astype(np.int64)
    kept = low + grown
    kept = np.where(since == pace.required, high, np.maximum(low, kept - kept % pace.seq_per_step))
    # Before step 0, too, the kept length is that of the start, where nothing else was asked for.
    dropping = clock >= pace.start if pace.start else np.ones_like(clock, dtype=bool)
    if pace.end is not None:
        dropping &= clock < pace.end
    return np.where(dropping, kept, -1)
