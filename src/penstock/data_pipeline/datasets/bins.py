"""Which documents share a row: best-fit-decreasing bin packing, in whole classes of equal documents.

Documents are placed from the longest to the shortest, each into the fullest row that still has room (Ding et al.,
"Fewer Truncations Improve Language Modeling", ICML 2024, pack documents so). Lengths are whole numbers up to the row's,
so all documents of one length, and all rows with the same room, are handled in one step: sorting costs O(N log N), and
the steps are few beside N.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bins:
    """Which items lie in which bin.

    Attributes:
        items: Item numbers, bin by bin; int64.
        starts: Bin ``b`` holds ``items[starts[b]:starts[b + 1]]``; int64, one more than there are bins.
        capacity: What a bin holds.
        filled: The sum of all lengths.
    """

    items: IndexArray
    starts: IndexArray
    capacity: int
    filled: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def padding(self) -> float:
        """The share of all room that is left empty."""
        return 1 - self.filled / (len(self) * self.capacity) if len(self) else 0.0


def best_fit(lengths: npt.ArrayLike, capacity: int) -> Bins:
    """Pack items into as few bins as best-fit decreasing needs (at most 11/9 of the fewest, and 4 more).

    Args:
        lengths: Whole numbers from 1 to ``capacity``, one dimension.
        capacity: Room of a bin.

    Raises:
        ValueError: A length is out of range.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if capacity < 1 or sizes.ndim != 1 or (sizes.size and not 1 <= int(sizes.min()) <= int(sizes.max()) <= capacity):
        shown = f"{sizes.min()} to {sizes.max()}" if sizes.size else f"the shape {sizes.shape}"
        raise ValueError(f"items of 1 to capacity={capacity} can be packed, got {shown}; cut longer ones first")
    order = np.argsort(-sizes, kind="stable")
    edges = [*np.flatnonzero(np.diff(sizes[order], prepend=capacity + 1)).tolist(), len(sizes)]
    place = np.empty(len(sizes), dtype=np.int64)  # the bin of each item of the order
    rooms = _Rooms(capacity)
    for first, stop in pairwise(edges):
        length, at = int(sizes[order[first]]), first
        while at < stop:
            at += rooms.fill(length, place[at:stop])
    by_bin = np.argsort(place, kind="stable")
    starts = np.zeros(rooms.opened + 1, dtype=np.int64)
    np.cumsum(np.bincount(place, minlength=rooms.opened), out=starts[1:])
    return Bins(order[by_bin], starts, capacity, int(sizes.sum()))


class _Rooms:
    """The open bins by how much room each has left.

    Attributes:
        opened: How many bins there are, open or full.
    """

    def __init__(self, capacity: int) -> None:
        self.opened = 0
        self._capacity = capacity
        self._bins: dict[int, list[IndexArray]] = {}
        self._has = 0  # bit r is set while there is a bin with room r

    def fill(self, length: int, out: IndexArray) -> int:
        """Place some items of one length where they fit best: write their bins to ``out``, return how many they are.

        The first of several such items goes to the fullest bin with room, and the next ones to the same bin while it
        has room: it is fuller still. So every bin of a class takes ``room // length`` of them.
        """
        fitting = self._has >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            bins = self._take(room)
        else:
            room = self._capacity
            count = -(-len(out) // (room // length))
            bins = np.arange(self.opened, self.opened + count)
            self.opened += count
        each = room // length
        whole = min(len(bins), len(out) // each)
        out[: whole * each] = np.repeat(bins[:whole], each)
        self._put(room - each * length, bins[:whole])
        placed, rest = whole * each, len(out) - whole * each
        if whole < len(bins) and rest:
            out[placed:] = bins[whole]
            self._put(room - rest * length, bins[whole : whole + 1])
            placed, whole = len(out), whole + 1
        self._put(room, bins[whole:])
        return placed

    def _take(self, room: int) -> IndexArray:
        self._has ^= 1 << room
        return np.concatenate(self._bins.pop(room))

    def _put(self, room: int, bins: IndexArray) -> None:
        if len(bins) and room:
            self._bins.setdefault(room, []).append(bins)
            self._has |= 1 << room
