"""Batches of about equally many tokens, whatever the lengths of the samples; nothing is dropped.

The order is looked at in *windows* of many positions. In a window samples are sorted by length, longest first, and cut
into micro-batches as full as the budget allows (rows times the longest row), ``O(N log N)`` in all. Neighbours in the
sorted window are of almost the same length, so almost nothing is padding. Micro-batches make steps, and the steps of a
window are shuffled by a key::

    window:        positions 0 .. W-1 of the order          positions W .. 2W-1
    sorted:        |longest ... shortest|
    micro-batches: [2 rows][2 rows][3 rows] ... [40 rows]
    steps of M:    [----- M -----][----- M -----] ...       in a keyed order

A step whose micro-batches are of one length costs all replicas the same; it is how dataset decomposition draws its
buckets (Pouransari et al., "Dataset decomposition: Faster LLM training with variable sequence length curriculum",
NeurIPS 2024), where lengths are powers of two and nothing is padded at all. ``shuffle: micro_batches`` mixes lengths
within a step instead.

Windows divide epochs, so each epoch still holds each sample once, and what is in a window is a function of the order
and the seed: the state of a run is the number of samples consumed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from penstock._core.keys import derive
from penstock.data_pipeline.data_sampling.order import IntArray
from penstock.data_pipeline.data_sampling.permutation import permute

_RADIX: Final = 1 << 16


class TokenBudgetConfig(BaseModel):
    """How samples are gathered into micro-batches of equal tokens.

    Attributes:
        max_tokens: Most tokens of a micro-batch, padding included: rows times the longest row.
        max_rows: Most rows of a micro-batch; None leaves that to the budget.
        multiple_of: Rows are padded to a multiple of so many tokens.
        window: Positions of the order that are sorted together. More give less padding and mix less.
        shuffle: ``steps`` keeps one length per step, ``micro_batches`` mixes lengths within a step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int = Field(ge=1)
    max_rows: int | None = Field(default=None, ge=1)
    multiple_of: int = Field(default=1, ge=1)
    window: int = Field(default=1 << 17, ge=1)
    shuffle: Literal["steps", "micro_batches"] = "steps"


@dataclass(frozen=True)
class MicroBatchPlan:
    """One micro-batch.

    Attributes:
        positions: The positions of its rows in the order.
        width: Tokens of its rows once they are padded.
        tokens: Tokens of its rows without padding.
        repeats: It repeats rows of another one, so that a step has all its micro-batches; it is to count as nothing.
    """

    positions: IntArray
    width: int
    tokens: int
    repeats: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One global batch.

    Attributes:
        micro_batches: All of it, over all replicas.
    """

    micro_batches: tuple[MicroBatchPlan, ...]

    @property
    def samples(self) -> int:
        """Samples that it consumes."""
        return sum(len(plan.positions) for plan in self.micro_batches if not plan.repeats)

    @property
    def tokens(self) -> int:
        """Tokens that it consumes, without padding."""
        return sum(plan.tokens for plan in self.micro_batches if not plan.repeats)

    @property
    def padded_tokens(self) -> int:
        """Tokens that are computed, with padding and repeats."""
        return sum(len(plan.positions) * plan.width for plan in self.micro_batches)


class _Window:
    """The steps of one window.

    Attributes:
        steps: How many there are.
        begins: How many of the window's samples come before each step, and in all; int64, one more than there are
            steps.
    """

    def __init__(self, lengths: IntArray, start: int, micro_batches: int, key: int, config: TokenBudgetConfig) -> None:
        self._start = start
        widths = -(-lengths // config.multiple_of) * config.multiple_of
        narrow = widths.astype(np.uint16) if widths.max() < _RADIX else widths  # a radix sort takes 16 bits
        self._sorted = np.argsort(narrow, kind="stable")[::-1]
        self._widths, self._tokens = widths[self._sorted], np.cumsum(np.append(0, lengths[self._sorted]))
        cuts = _cut(self._widths, config)
        pairs = np.stack([cuts[:-1], cuts[1:]], axis=1)
        if config.shuffle == "micro_batches":
            pairs = pairs[permute(np.arange(len(pairs), dtype=np.int64), len(pairs), derive(key, "micro-batches"))]
        whole = len(pairs) // micro_batches * micro_batches
        groups = [*pairs[:whole].reshape(-1, micro_batches, 2)]
        repeats = 0
        if whole < len(pairs):
            filled, repeats = _filled([tuple(pair) for pair in pairs[whole:].tolist()], micro_batches)
            groups.append(np.array(filled))
        self.steps = len(groups)
        shuffled = permute(np.arange(self.steps, dtype=np.int64), self.steps, derive(key, "steps"))
        self._groups = np.stack(groups)[shuffled]
        self._repeats = np.where(shuffled == self.steps - 1, repeats, 0)
        rows = np.diff(self._groups, axis=2)[:, :, 0]
        counted = np.arange(micro_batches) < micro_batches - self._repeats[:, None]
        self.begins = np.cumsum(np.append(0, (rows * counted).sum(axis=1)))
        self.padded = int((rows * self._widths[self._groups[:, :, 0]]).sum())

    def step(self, number: int) -> StepPlan:
        """The window's ``number``-th step."""
        group, repeats = self._groups[number].tolist(), int(self._repeats[number])
        return StepPlan(
            tuple(
                MicroBatchPlan(
                    positions=self._start + self._sorted[first:end],
                    width=int(self._widths[first]),
                    tokens=int(self._tokens[end] - self._tokens[first]),
                    repeats=i >= len(group) - repeats,
                )
                for i, (first, end) in enumerate(group)
            )
        )

    def sequence(self) -> IntArray:
        """The window's places in the order in which its steps take them."""
        groups, repeats = self._groups.tolist(), self._repeats.tolist()
        taken = [pair for group, last in zip(groups, repeats, strict=True) for pair in group[: len(group) - last]]
        return np.concatenate([self._sorted[first:end] for first, end in taken])


class TokenBudget:
    """Cuts an order into steps of micro-batches of equal tokens.

    Args:
        lengths: Tokens of each sample, as the model sees them.
        sample_at: The order: from positions to samples.
        epoch_size: Positions of an epoch of the order.
        micro_batches: Micro-batches of a step, over all replicas.
        seed: Shuffles the steps.
        config: The budget.

    Raises:
        ValueError: A sample is longer than the budget, or an epoch has fewer samples than a step has micro-batches.
    """

    def __init__(
        self,
        lengths: npt.NDArray[Any],
        sample_at: Callable[[IntArray], IntArray],
        epoch_size: int,
        micro_batches: int,
        seed: int,
        config: TokenBudgetConfig,
    ) -> None:
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths):
            raise ValueError(f"expected one length per sample, got {lengths.dtype} of shape {lengths.shape}")
        longest, shortest = int(lengths.max()), int(lengths.min())
        padded = -(-longest // config.multiple_of) * config.multiple_of
        if padded > config.max_tokens:
            raise ValueError(
                f"sample {int(lengths.argmax())} takes {padded} tokens, more than max_tokens={config.max_tokens} of a "
                "whole micro-batch; raise the budget, or truncate the samples"
            )
        if shortest < 1:
            raise ValueError(f"sample {int(lengths.argmin())} has {shortest} tokens; a sample needs at least 1")
        if epoch_size < micro_batches:
            raise ValueError(
                f"an epoch of {epoch_size} samples cannot fill the {micro_batches} micro-batches of a step; take fewer"
            )
        self._lengths, self._sample_at = lengths, sample_at
        self._epoch_size, self._micro_batches = epoch_size, micro_batches
        self._key, self._config = derive(seed, "token budget"), config
        self._per_epoch = max(1, epoch_size // max(config.window, micro_batches))
        self._known: tuple[int, _Window | None] = (-1, None)

    def step_at(self, consumed: int) -> StepPlan:
        """The step that a run takes after ``consumed`` samples.

        Raises:
            ValueError: No step begins there: the samples before it were not consumed by steps of this budget.
        """
        start, window = self._window_at(consumed)
        number = int(np.searchsorted(window.begins, consumed - start))
        if window.begins[number] != consumed - start:
            raise ValueError(
                f"no step begins after {consumed} samples; max_tokens, window or another part of the token budget is "
                "not what it was when these were consumed: restore it"
            )
        return window.step(number)

    def positions(self, start: int, stop: int) -> IntArray:
        """The positions in the order of the samples that a run consumes as its ``start``-th to ``stop - 1``-th."""
        parts: list[IntArray] = []
        while start < stop:
            first, window = self._window_at(start)
            sequence = window.sequence()
            parts.append(first + sequence[start - first : stop - first])
            start = first + len(sequence)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def summary(self, start: int, stop: int) -> tuple[int, int, int]:
        """Steps, tokens without and tokens with padding of the windows from position ``start`` to ``stop``."""
        steps = tokens = padded = 0
        while start < stop:
            first, window = self._window_at(start)
            steps += window.steps
            tokens += int(window._tokens[-1])
            padded += window.padded
            start = first + int(window.begins[-1])
        return steps, tokens, padded

    def _window_at(self, consumed: int) -> tuple[int, _Window]:
        """Where the window around a position begins, and the window."""
        epoch, place = divmod(consumed, self._epoch_size)
        size = self._epoch_size // self._per_epoch
        inside = min(place // size, self._per_epoch - 1)
        number = epoch * self._per_epoch + inside
        start = epoch * self._epoch_size + inside * size
        known, window = self._known
        if known != number or window is None:
            last = inside == self._per_epoch - 1
            stop = (epoch + 1) * self._epoch_size if last else start + size
            samples = self._sample_at(np.arange(start, stop, dtype=np.int64))
            lengths = self._lengths[samples].astype(np.int64)
            window = _Window(lengths, start, self._micro_batches, derive(self._key, number), self._config)
            self._known = (number, window)
        return start, window


def _cut(widths: IntArray, config: TokenBudgetConfig) -> IntArray:
    """Where micro-batches of rows sorted from wide to narrow begin, and the end."""
    rows = config.max_tokens // widths
    if config.max_rows is not None:
        rows = np.minimum(rows, config.max_rows)
    fits, count = rows.tolist(), len(widths)
    cuts, place = [0], 0
    while place < count:
        place += fits[place]
        cuts.append(min(place, count))
    return np.array(cuts, dtype=np.int64)


def _filled(batches: list[tuple[int, int]], wanted: int) -> tuple[list[tuple[int, int]], int]:
    """Make ``wanted`` micro-batches of fewer, by halving those of most rows; then by repeats, counted."""
    while len(batches) < wanted:
        largest = max(range(len(batches)), key=lambda i: batches[i][1] - batches[i][0])
        first, end = batches[largest]
        if end - first == 1:
            repeats = wanted - len(batches)
            return batches + batches[:1] * repeats, repeats
        middle = (first + end + 1) // 2
        batches[largest : largest + 1] = [(first, middle), (middle, end)]
    return batches, 0
