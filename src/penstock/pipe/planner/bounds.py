"""Finds where to cut a model into stages."""

from collections.abc import Callable, Iterator, Sequence
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
        all_up_to: How many divisions to try without a search.
    """
    layers = len(loads)
    start = balance(loads, num_stages)
    if comb(layers - 1, num_stages - 1) <= all_up_to:
        return min(all_bounds(layers, num_stages), key=lambda bounds: (score(bounds), bounds != start))
    return _descend(start, score)


def all_bounds(layers: int, num_stages: int) -> Iterator[Bounds]:
    """Every division of layers into non-empty stages."""
    for cuts in combinations(range(1, layers), num_stages - 1):
        yield (0, *cuts, layers)


def _descend(start: Bounds, score: Callable[[Bounds], Any]) -> Bounds:
    known = {start: score(start)}
    best = start
    while True:
        for bounds in _neighbours(best):
            if bounds not in known:
                known[bounds] = score(bounds)
        lowest = min(known, key=known.__getitem__)
        if known[lowest] >= known[best]:
            return best
        best = lowest


def _neighbours(bounds: Bounds) -> Iterator[Bounds]:
    """Runs of neighbouring cuts moved by one layer: one stage gives a layer away, another one takes one."""
    stages = len(bounds) - 1
    for first in range(1, stages):
        for last in range(first, stages):
            for step in (-1, 1):
                moved = tuple(b + step if first <= i <= last else b for i, b in enumerate(bounds))
                if moved[first - 1] < moved[first] and moved[last] < moved[last + 1]:
                    yield moved
