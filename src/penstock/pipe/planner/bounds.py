"""Finds where to cut a model into stages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import combinations
from math import comb
from typing import Any, Final

from penstock.pipe.partition import balance

Bounds = tuple[int, ...]

_ALL_UP_TO: Final = 300
"""Divisions up to which all of them are tried."""


def best_bounds(
    loads: Sequence[float],
    num_stages: int,
    score: Callable[[Bounds], Any],
    *,
    least: Callable[[Bounds], Any] | None = None,
    all_up_to: int = _ALL_UP_TO,
) -> Bounds:
    """The division with the lowest score, of all where they are few; else one that no small change improves.

    A search starts from the division whose longest stage is shortest, which dynamic programming finds exactly, and
    moves neighbouring cuts by one layer as long as that helps. With several stages on a rank it is the rank's load that
    counts, and with few micro-batches it is not the longest stage alone, so the score decides.

    Args:
        loads: For each layer, the time of a micro-batch, forward and backward.
        num_stages: How many stages; at most as many as layers.
        score: Of bounds; comparable.
        least: What the score of bounds is at least, where that is found sooner than the score: divisions that cannot be
            better than the best one so far are then passed over.
        all_up_to: How many divisions to try without a search.
    """
    layers = len(loads)
    score, least = cache(score), None if least is None else cache(least)
    start = balance(loads, num_stages)
    if comb(layers - 1, num_stages - 1) <= all_up_to:
        return _lowest(start, all_bounds(layers, num_stages), score, least)
    while True:
        best = _lowest(start, _neighbours(start), score, least)
        if best == start:
            return best
        start = best


def all_bounds(layers: int, num_stages: int) -> Iterator[Bounds]:
    """Every division of layers into non-empty stages."""
    for cuts in combinations(range(1, layers), num_stages - 1):
        yield (0, *cuts, layers)


def _lowest(
    start: Bounds, others: Iterable[Bounds], score: Callable[[Bounds], Any], least: Callable[[Bounds], Any] | None
) -> Bounds:
    """Of all these bounds those with the lowest score; the start, where no others are lower."""
    best, lowest = start, score(start)
    for bounds in others if least is None else sorted(others, key=least):
        if least is not None and least(bounds) >= lowest:
            break
        found = score(bounds)
        if found < lowest:
            best, lowest = bounds, found
    return best


def _neighbours(bounds: Bounds) -> Iterator[Bounds]:
    """Runs of neighbouring cuts moved by one layer: one stage gives a layer away, another one takes one."""
    stages = len(bounds) - 1
    for first in range(1, stages):
        for last in range(first, stages):
            for step in (-1, 1):
                moved = tuple(b + step if first <= i <= last else b for i, b in enumerate(bounds))
                if moved[first - 1] < moved[first] and moved[last] < moved[last + 1]:
                    yield moved
