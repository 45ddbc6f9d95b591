"""Stretches of the order that a run leaves out, bad batches after a loss spike for example.

A run counts its own positions, 0, 1, 2, ... without gaps. Each has a *place* in the order: as many places are passed
over before it as the ranges that begin by then hold::

    order:  0 1 2 [3 4 5] 6 7 8 [9] 10 ...        skip_ranges = [(3, 6), (9, 10)]
    run:    0 1 2         3 4 5      6 ...
"""

from collections.abc import Sequence

import numpy as np

from penstock.data_pipeline.data_sampling.order import IntArray


class SkipRanges:
    """From positions of a run to places of its order.

    Args:
        ranges: Pairs ``(first, end)`` of places; sorted and joined here.

    Raises:
        ValueError: A range is empty or begins below 0.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        for first, end in ranges:
            if not 0 <= first < end:
                raise ValueError(
                    f"skip_ranges: ({first}, {end}) is not a stretch of the order; give its first place, from 0, and "
                    "one past its last"
                )
        joined: list[tuple[int, int]] = []
        for first, end in sorted((int(first), int(end)) for first, end in ranges):
            if joined and first <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((first, end))
        self.ranges = tuple(joined)
        lengths = np.array([end - first for first, end in joined], dtype=np.int64)
        self._passed = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._begins = np.array([first for first, _ in joined], dtype=np.int64) - self._passed[:-1]

    def places(self, k: IntArray) -> IntArray:
        """The places in the order at positions ``k`` of the run."""
        if not self.ranges:
            return k
        return np.asarray(k + self._passed[np.searchsorted(self._begins, k, side="right")], dtype=np.int64)

    def begun_before(self, k: int) -> tuple[tuple[int, int], ...]:
        """The ranges that a run has passed over when it stands at position ``k``."""
        return self.ranges[: int(np.searchsorted(self._begins, k, side="left"))]
