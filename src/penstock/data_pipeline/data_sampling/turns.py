"""Whose turn it is: a sequence of sources whose counts follow their weights as closely as whole numbers can.

At every prefix ``k`` each source's count differs from its ideal, the sum of its shares over the first ``k`` turns, by
less than one (the chairman assignment problem: Tijdeman, "The chairman assignment problem", Discrete Mathematics 32,
1980). Turn ``j`` of a source may come once its ideal exceeds ``j`` and must have come before its ideal reaches
``j + 1``. These are unit jobs with releases and deadlines on one machine; fractions of them fit, so whole ones do, and
giving each turn to the open job of the earliest deadline finds a way (Horn, "Some simple scheduling algorithms", 1974).

With constant shares of denominator ``P`` the sequence comes to repeat itself every ``P`` turns. So only a few periods
of each stage are ever worked out, in exact integers, and any position is looked up among them.
"""

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

FINEST: Final = 1 << 20
"""Largest denominator of shares; finer ones are rounded to multiples of ``1 / FINEST``."""


@dataclass(frozen=True)
class _Stretch:
    """Turns from ``start`` on: ``sources``, over and over.

    Attributes:
        start: First turn.
        sources: Whose turn it is, of one period; uint16.
        ranks: How many turns before it in the period were of the same source; int32.
        before: Turns of each source before ``start``; int64.
        each: Turns of each source in a period; int64.
    """

    start: int
    sources: npt.NDArray[np.uint16]
    ranks: npt.NDArray[np.int32]
    before: IntArray
    each: IntArray


def exact_shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to weights, as small as they can be.

    A float stands for its shortest decimal form, so 0.7 is seven tenths. Where the sum would exceed :data:`FINEST` the
    shares are rounded to it by largest remainder, none of a positive weight to nothing.

    Args:
        weights: Each at least 0, one of them above.
    """
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    total = sum(whole)
    if total <= FINEST:
        return whole
    floors = [max(number * FINEST // total, int(number > 0)) for number in whole]
    missing = FINEST - sum(floors)
    if missing < 0:  # sources that were raised to 1 take from the largest
        floors[max(range(len(floors)), key=floors.__getitem__)] += missing
    by_remainder = sorted(range(len(whole)), key=lambda index: -(whole[index] * FINEST % total))
    for index in by_remainder[: max(0, missing)]:
        floors[index] += 1
    divisor = math.gcd(*floors)
    return [number // divisor for number in floors]


class Turns:
    """A sequence of turns among sources, a pure function of the stages.

    Args:
        stages: Pairs of a stage's first turn and the sources' weights in it; the first begins at 0, and they rise.

    Attributes:
        shares: Of each stage: the sources' shares as whole numbers.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]) -> None:
        self._starts = [start for start, _ in stages]
        self.shares = [exact_shares(weights) for _, weights in stages]
        self._sources = len(self.shares[0])
        ideal = [Fraction(0)] * self._sources
        self._ideals = [ideal]
        for (start, end), shares in zip(pairwise(self._starts), self.shares, strict=False):
            ideal = [at + Fraction(share * (end - start), sum(shares)) for at, share in zip(ideal, shares, strict=True)]
            self._ideals.append(ideal)
        self._stretches: list[_Stretch] = []
        self._begins: list[int] = []
        self._covered = 0  # turns worked out; beyond a period that repeats for ever: infinitely many
        self._endless = False
        self._counts = [0] * self._sources

    def ideal(self, k: int, source: int) -> Fraction:
        """The sum of the source's shares over the first ``k`` turns."""
        stage = bisect.bisect_right(self._starts, k) - 1
        shares = self.shares[stage]
        return self._ideals[stage][source] + Fraction(shares[source] * (k - self._starts[stage]), sum(shares))

    def __call__(self, k: IntArray) -> tuple[IntArray, IntArray]:
        """Whose turns ``k`` are (each at least 0), and which turn of that source it is, from 0; int64."""
        if not len(k):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._work_out(int(k.max()))
        sources, ranks = np.empty(len(k), dtype=np.int64), np.empty(len(k), dtype=np.int64)
        which = np.searchsorted(self._begins, k, side="right") - 1
        for number in np.unique(which):
            stretch, here = self._stretches[number], which == number
            period, place = np.divmod(k[here] - stretch.start, len(stretch.sources))
            found = stretch.sources[place].astype(np.int64)
            sources[here] = found
            ranks[here] = stretch.before[found] + period * stretch.each[found] + stretch.ranks[place]
        return sources, ranks

    def counts(self, k: int) -> IntArray:
        """How many of the first ``k`` turns are of each source; int64."""
        if k == 0:
            return np.zeros(self._sources, dtype=np.int64)
        self._work_out(k - 1)
        stretch = self._stretches[bisect.bisect_right(self._begins, k - 1) - 1]
        periods, rest = divmod(k - stretch.start, len(stretch.sources))
        part = np.bincount(stretch.sources[:rest], minlength=self._sources)
        return np.asarray(stretch.before + periods * stretch.each + part, dtype=np.int64)

    def _work_out(self, k: int) -> None:
        """Work turns out until turn ``k`` is among them."""
        while not self._endless and self._covered <= k:
            stage = bisect.bisect_right(self._starts, self._covered) - 1
            start, end = self._covered, self._starts[stage + 1] if stage + 1 < len(self._starts) else None
            shares = self.shares[stage]
            period = sum(shares)
            length = period if end is None else min(period, end - start)
            before = list(self._counts)
            sources = np.array(self._earliest_deadlines(stage, start, length), dtype=np.uint16)
            each = np.bincount(sources, minlength=self._sources).astype(np.int64)
            ranks = np.empty(length, dtype=np.int32)
            sorted_by_source = np.argsort(sources, kind="stable")
            ranks[sorted_by_source] = np.arange(length) - np.repeat(np.cumsum(each) - each, each)
            self._begins.append(start)
            self._stretches.append(_Stretch(start, sources, ranks, np.array(before, dtype=np.int64), each))
            periods = 1
            if length == period and each.tolist() == shares:  # as far ahead and behind as before: it repeats itself,
                if end is None:
                    self._endless = True
                else:  # until a turn whose deadline lies in the next stage could be given
                    periods = max(1, (end - start) // period - 1)
            self._counts = [count + periods * int(turns) for count, turns in zip(before, each, strict=True)]
            self._covered += periods * length

    def _earliest_deadlines(self, stage: int, start: int, length: int) -> list[int]:
        """The turns from ``start``, inside a stage, each to the open job of the earliest deadline; ties by number."""
        origin, shares, counts = self._starts[stage], self.shares[stage], list(self._counts)
        ideals = self._ideals[stage]
        total = sum(shares)
        # In units of 1 / scale all ideals of the stage are whole: base + rate * (turn - origin).
        scale = math.lcm(total, *(ideal.denominator for ideal in ideals))
        base = [int(ideal * scale) for ideal in ideals]
        rate = [share * (scale // total) for share in shares]
        stop = start + length
        stage_end = self._starts[stage + 1] if stage + 1 < len(self._starts) else None
        closed: list[tuple[int, int]] = []  # by release
        ready: list[tuple[float, int]] = []  # by deadline

        def next_job(source: int, now: int) -> None:
            need, speed = counts[source] * scale - base[source], rate[source]
            if speed:
                release = max(now, origin + need // speed)
            elif need < 0:
                release = now
            else:
                return  # not in this stage any more
            if release < stop:
                heapq.heappush(closed, (release, source))

        def deadline(source: int) -> float:
            need, speed = (counts[source] + 1) * scale - base[source], rate[source]
            if speed:
                found = origin - (-need // speed)
                if stage_end is None or found <= stage_end:
                    return found
            return self._later_deadline(source, counts[source] + 1, stage + 1)

        for source in range(self._sources):
            next_job(source, start)
        turns = []
        for now in range(start, stop):
            while closed and closed[0][0] <= now:
                source = heapq.heappop(closed)[1]
                heapq.heappush(ready, (deadline(source), source))
            source = heapq.heappop(ready)[1]
            turns.append(source)
            counts[source] += 1
            next_job(source, now + 1)
        return turns

    def _later_deadline(self, source: int, count: int, stage: int) -> float:
        """The first turn, in a stage or after it, at which the source's ideal has reached a count."""
        for number in range(stage, len(self._starts)):
            share = self.shares[number][source]
            if not share:
                continue
            missing = (count - self._ideals[number][source]) * sum(self.shares[number]) / share
            found = self._starts[number] + math.ceil(missing)
            if number + 1 == len(self._starts) or found <= self._starts[number + 1]:
                return found
        return math.inf
