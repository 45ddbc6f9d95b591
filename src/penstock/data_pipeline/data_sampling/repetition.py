"""How much a sample repeats itself: three measures, from flat tokens and offsets to one number per sample.

In all three small numbers are given to samples that repeat much, except the share of repeated n-grams, which grows.
"""

import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.keys import U64Array, mix
from penstock.data_pipeline.data_sampling.metrics import MetricFunction, Offsets, Tokens

_SORTED_AT_ONCE: Final = 1 << 18


def unique_ratio(tokens: Tokens, offsets: Offsets) -> npt.NDArray[np.float64]:
    """Distinct tokens over tokens, in ``(0, 1]``; a sample without tokens gets 1."""
    lengths = np.diff(offsets)
    values = np.ones(len(lengths))
    for which, rows in _rows_of_like_length(tokens, offsets, lengths):
        values[which] = _distinct(rows) / lengths[which]
    return values


def repeated_ngrams(n: int = 3) -> MetricFunction:
    """The metric: the share of a sample's n-grams that stood in it before, in ``[0, 1)``.

    N-grams are told apart by 64-bit hashes: two of a sample's are mistaken for the same with a chance below 1e-12 for
    samples of a thousand tokens.

    Args:
        n: Tokens of an n-gram, at least 1. A sample shorter than this gets 0.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"an n-gram has at least 1 token, got n={n}")

    def share(tokens: Tokens, offsets: Offsets) -> npt.NDArray[np.float64]:
        values = np.zeros(len(offsets) - 1)
        if len(tokens) < n:
            return values
        # The n-gram that begins at each place; those that run over a sample's end are left out by the lengths.
        grams = _hashes(tokens, n)
        lengths = np.maximum(np.diff(offsets) - (n - 1), 0)
        for which, rows in _rows_of_like_length(grams, offsets, lengths):
            values[which] = 1 - _distinct(rows) / lengths[which]
        return values

    return share


def compression_ratio(tokens: Tokens, offsets: Offsets) -> npt.NDArray[np.float64]:
    """Size after compression by zlib over the size before, of a sample's tokens as 32-bit integers.

    Small where a sample repeats itself, and independent of how the corpus stores its tokens; a few bytes of framing
    make it larger for short samples. A sample without tokens gets 1.

    Raises:
        ValueError: A token does not fit 32 bits.
    """
    if tokens.size and (int(tokens.min()) < -(1 << 31) or int(tokens.max()) >= 1 << 32):
        raise ValueError(f"compressionratio takes tokens of 32 bits, got {tokens.min()} to {tokens.max()}")
    data = tokens.astype("<i8", copy=False).astype("<u4").tobytes()
    ends = (offsets * 4).tolist()
    sizes = [len(zlib.compress(data[a:b], 1)) / (b - a) if b > a else 1.0 for a, b in pairwise(ends)]
    return np.asarray(sizes, dtype=np.float64)


def _hashes(tokens: Tokens, n: int) -> U64Array:
    grams = len(tokens) - n + 1
    words = tokens.astype(np.int64, copy=False).astype(np.uint64)
    found = np.zeros(grams, dtype=np.uint64)
    for place in range(n):
        found = mix(found + words[place : place + grams] + np.uint64(place + 1))
    return found


def _rows_of_like_length(
    flat: npt.NDArray[Any], offsets: Offsets, lengths: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """The first ``lengths[i]`` entries of every sample that has any, as tables of rows.

    A row is filled up with copies of its first entry, which leaves its distinct entries as they are. Samples of one
    table differ in length by less than a factor of two, so that at most half of it is filling.

    Yields:
        Sample numbers and their table, ``[samples, longest]``.
    """
    order = np.argsort(lengths, kind="stable")
    at = int(np.searchsorted(lengths[order], 1))
    while at < len(order):
        shortest = int(lengths[order[at]])
        stop = int(np.searchsorted(lengths[order], 2 * shortest))
        stop = min(stop, at + max(1, _SORTED_AT_ONCE // (2 * shortest)))
        which = order[at:stop]
        width = int(lengths[which[-1]])
        places = np.arange(width)
        inside = np.where(places < lengths[which][:, None], places, 0)
        yield which, flat[offsets[which][:, None] + inside]
        at = stop


def _distinct(rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Distinct entries of each row; the table is sorted in place."""
    rows.sort(axis=1)
    return np.asarray(1 + np.count_nonzero(rows[:, 1:] != rows[:, :-1], axis=1))
