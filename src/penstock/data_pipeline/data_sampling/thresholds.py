"""What each birth admits of one metric, for samples that are looked at chunk by chunk.

Whatever a schedule says comes down to one *threshold* per birth: a pair ``(value, sample)``. The birth admits the
samples whose own pair is not above it, compared as tuples. A difficulty by value admits equal values together, so the
sample of its threshold is the last one; a percentile admits exactly so many samples, equal values in sample order, so
its threshold is the last sample that is still in. Then the entry point of a sample is a look-up, and neither the
values nor a sorted copy of them need to be in memory.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.data_sampling.order import IntArray

CHUNK: Final = 1 << 21
"""Samples that are looked at together."""

_TABLE: Final = 1 << 20
_DIGIT: Final = 16

Array = npt.NDArray[Any]


class Thresholds:
    """The births of one metric.

    Args:
        values: The threshold values, rising; of the metric's dtype or float64.
        samples: The threshold samples; rising where values are equal.
    """

    def __init__(self, values: Array, samples: IntArray) -> None:
        self.count = len(values)
        self._samples = samples
        self._values = values
        self._unique, starts = np.unique(values, return_index=True)
        self._starts = starts.astype(np.uint16)
        self._never = np.append(self._starts, np.uint16(self.count))

    def blocks(self, values: Array, start: int) -> npt.NDArray[np.uint16]:
        """The first birth that admits each of the samples from number ``start`` on; the number of births if none."""
        # For a sample whose value equals a threshold's: the births of that value whose sample lies before it fail.
        failed = np.add.reduceat(self._samples < start, self._starts.astype(np.int64)).astype(np.uint16)
        tied = self._starts + failed
        found = self._by_table(values, tied)
        if found is None:
            at = np.searchsorted(self._unique, values, side="left")
            equal = self._unique[np.minimum(at, len(self._unique) - 1)] == values
            found = np.where(equal, np.append(tied, np.uint16(self.count))[at], self._never[at])
        inside = (self._samples >= start) & (self._samples < start + len(values))
        for number in np.flatnonzero(inside):
            rest = int(self._samples[number]) + 1 - start
            found[rest:][values[rest:] == self._values[number]] += np.uint16(1)
        return found

    def _by_table(self, values: Array, tied: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16] | None:
        """The look-up by a table over all integers between the thresholds, where they are few."""
        if values.dtype.kind not in "iu" or self._unique.dtype != values.dtype:
            return None
        low, high = int(self._unique[0]), int(self._unique[-1])
        if high - low >= min(_TABLE, len(values)):
            return None
        offsets = np.array([int(value) - low for value in self._unique])
        between = np.arange(high - low + 1)
        at = np.searchsorted(offsets, between)
        table = np.where(offsets[at] == between, tied[at], self._never[at])
        clipped = np.clip(values, self._unique[0], self._unique[-1])
        wide = values.dtype.itemsize == 8  # differences of narrower ones may not fit their own dtype
        found = table[(clipped - self._unique[0]).astype(np.int64) if wide else clipped.astype(np.int64) - low]
        found[values < self._unique[0]] = 0
        found[values > self._unique[-1]] = self.count
        return np.asarray(found, dtype=np.uint16)


def value_thresholds(values: Array, difficulties: Sequence[float]) -> Thresholds:
    """Thresholds of difficulties that are values of the metric."""
    last = np.full(len(difficulties), len(values), dtype=np.int64)
    if values.dtype.kind == "f":
        return Thresholds(np.asarray(difficulties, dtype=np.float64), last)
    # For integers, what is at most 2.5 is at most 2; below the dtype's range nothing is admitted.
    limits = np.iinfo(values.dtype)
    floors = [math.floor(difficulty) for difficulty in difficulties]
    last[[floor < limits.min for floor in floors]] = -1
    clipped = [min(max(floor, int(limits.min)), int(limits.max)) for floor in floors]
    return Thresholds(np.asarray(clipped, dtype=values.dtype), last)


def percentile_thresholds(values: Array, percentiles: Sequence[float], order: IntArray | None) -> Thresholds:
    """Thresholds of difficulties that are percentages of the samples sorted by the metric, each above 0.

    Args:
        values: The metric of each sample.
        percentiles: Rising.
        order: The samples sorted by the metric, equal values by number, if that is known.
    """
    ranks = np.array([math.ceil(Fraction(str(percent)) * len(values) / 100) - 1 for percent in percentiles])
    samples = np.asarray(order[ranks], dtype=np.int64) if order is not None else _select(values, ranks)
    return Thresholds(np.asarray(values[samples]), samples)


def chunks(count: int) -> Iterator[slice]:
    """The numbers ``0 .. count - 1``, :data:`CHUNK` at a time."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


def _select(values: Array, ranks: IntArray) -> IntArray:
    """The samples that would stand at some ranks if all were sorted (stably) by value: a radix selection.

    Each pass over the values settles 16 bits of every wanted one; a last pass finds the sample among equal values.
    """
    bits = 8 * values.dtype.itemsize
    prefixes = np.zeros(len(ranks), dtype=np.uint64)
    rest = ranks.astype(np.int64)
    while bits:
        digit = min(_DIGIT, bits)
        bits -= digit
        wanted, which = np.unique(prefixes, return_inverse=True)
        counts = np.zeros((len(wanted), 1 << digit), dtype=np.int64)
        for part in chunks(len(values)):
            keys = _sortable(values[part]) >> np.uint64(bits)
            here, at = _matches(keys >> np.uint64(digit), wanted)
            low = (keys[here] & np.uint64((1 << digit) - 1)).astype(np.int64)
            counts += np.bincount((at << digit) + low, minlength=counts.size).reshape(counts.shape)
        ends = np.cumsum(counts, axis=1)
        for i, row in enumerate(which.tolist()):
            found = int(np.searchsorted(ends[row], rest[i], side="right"))
            rest[i] -= int(ends[row][found - 1]) if found else 0
            prefixes[i] = np.uint64((int(prefixes[i]) << digit) + found)
    samples = np.empty(len(ranks), dtype=np.int64)
    wanted, which = np.unique(prefixes, return_inverse=True)
    before = np.zeros(len(wanted), dtype=np.int64)
    for part in chunks(len(values)):
        here, at = _matches(_sortable(values[part]), wanted)
        counts = np.bincount(at, minlength=len(wanted))
        found_here = (before[which] <= rest) & (rest < (before + counts)[which])
        for i in np.flatnonzero(found_here).tolist():
            equal = here[at == which[i]]
            samples[i] = part.start + equal[rest[i] - before[which[i]]]
        before += counts
    return samples


def _matches(keys: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]) -> tuple[IntArray, IntArray]:
    """Where keys are among the wanted (sorted), and which of them they are."""
    at = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
    here = np.flatnonzero(wanted[at] == keys)
    return here, at[here]


def _sortable(values: Array) -> npt.NDArray[np.uint64]:
    """Unsigned integers that sort as the values do."""
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    width = 8 * values.dtype.itemsize
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    if values.dtype.kind == "u":
        return values.astype(np.uint64)
    top = unsigned.type(1 << (width - 1))
    if values.dtype.kind == "i":
        return np.asarray(np.ascontiguousarray(values).view(unsigned) ^ top, dtype=np.uint64)
    words = (values + values.dtype.type(0)).view(unsigned)  # adding 0 makes -0.0, which equals 0.0, the same word
    negative = (words & top) != 0
    return np.asarray(np.where(negative, ~words, words | top), dtype=np.uint64)
