"""The order of a pool that grows: what a curriculum makes of the samples.

The samples lie sorted by when they enter, so that the pool at any position is a prefix. Those that enter together are a
*block*. Within a *pass* no sample appears twice; a pass ends when every sample of the pool has appeared.

::

    k:        0 ........ births[1] ................ births[2] .... exhausted ........ exhausted ........
    blocks:   A          A B                        A B C          (A B C) merged     (A B C) merged
    segment:  repeat A   mix the unseen of A, B     mix A, B, C    repeat, pass p     repeat, pass p + 1

Between two events (a birth, or the end of a pass with several blocks) lies a *segment*. A segment of ``L`` positions
takes from each block a share proportional to the block's unseen samples, apportioned exactly by largest remainders; a
block's share is the next part of the block's own keyed permutation, so "unseen" is one cursor per block. A keyed
permutation of the ``L`` positions mixes the shares. When a pass ends (nothing being born at that very position) the
blocks become one, and as long as nothing is
born that one is permuted anew, pass after pass, in a single segment. So there are at most three segments per birth, and
a position is answered by a look-up of its segment and two permutations. Segments are planned when they are first asked
for.

Where births to come are not known yet (a curriculum paced by the validation loss), they fall on multiples of ``grid``
positions, and mixed segments end there too: what was drawn before a birth never depends on it.
"""

import bisect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.keys import derive
from penstock.data_pipeline.data_sampling.order import IntArray, digest_of, epoch_keys
from penstock.data_pipeline.data_sampling.permutation import permute

MAX_BLOCKS: Final = 256
"""How many blocks a pool is quantised to at most."""


def apportion(weights: Sequence[int], total: int) -> list[int]:
    """Split ``total`` in proportion to ``weights``, by largest remainders (Hamilton's method), in exact arithmetic.

    Each share is its quota ``total * weight / sum(weights)`` rounded down or up; equal remainders go to the first. For
    ``total <= sum(weights)`` no share exceeds its weight.
    """
    whole = sum(weights)
    divided = [divmod(total * weight, whole) for weight in weights]
    shares = [quota for quota, _ in divided]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-divided[i][1], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


@dataclass(slots=True)
class _Block:
    """A run of slots with one permutation, of which the first ``cursor`` have been drawn in this pass."""

    start: int
    size: int
    key: int
    cursor: int = 0


@dataclass(frozen=True, slots=True)
class _Mixed:
    """A segment that draws from several blocks."""

    first_k: int
    length: int
    mix_key: int
    starts: IntArray
    sizes: IntArray
    keys: npt.NDArray[np.uint64]
    cursors: IntArray
    bounds: IntArray  # where each block's share ends among the segment's positions

    def slots(self, k: IntArray) -> IntArray:
        mixed = permute(k - self.first_k, self.length, self.mix_key)
        which = np.searchsorted(self.bounds, mixed, side="right")
        before = np.concatenate([[0], self.bounds[:-1]])
        rank = mixed - before[which] + self.cursors[which]
        return self.starts[which] + permute(rank, self.sizes[which], self.keys[which])


@dataclass(frozen=True, slots=True)
class _Repeated:
    """A segment in which one block is permuted anew in each pass; pass ``first_pass`` began at ``origin_k``."""

    origin_k: int
    first_pass: int
    size: int
    base_key: int

    def slots(self, k: IntArray) -> IntArray:
        passes, rank = np.divmod(k - self.origin_k, self.size)
        return permute(rank, self.size, epoch_keys(self.base_key, passes + self.first_pass))


class GrowingOrder:
    """Positions to *slots*: places in the list of samples sorted by when they enter.

    Args:
        sizes: Samples in each block, at least 1 each.
        births: The position from which on each block is in the pool: rising, the first 0.
        seed: The key of all permutations.
        grid: Where mixed segments end besides, in positions; None where all births are known from the start.
    """

    def __init__(self, sizes: Sequence[int], births: Sequence[int], seed: int, grid: int | None = None) -> None:
        self._sizes, self._births, self._seed = [int(n) for n in sizes], [int(k) for k in births], seed
        self._grid = grid
        if not self._sizes or len(self._sizes) != len(self._births) or min(self._sizes) < 1:
            raise ValueError(f"every block needs a size of at least 1 and a birth, got {self._sizes}, {self._births}")
        if self._births[0] != 0 or any(b <= a for a, b in pairwise(self._births)):
            raise ValueError(f"births must start at 0 and rise, got {self._births}")
        if grid is not None and (grid < 1 or any(birth % grid for birth in self._births)):
            raise ValueError(f"births must be multiples of grid={grid}, got {self._births}")
        self.epoch_size = sum(self._sizes)
        self._pools = np.cumsum(self._sizes)
        self._base_key = derive(seed, "growing order, one block")
        self._segments: list[_Mixed | _Repeated] = []
        self._starts: list[int] = []
        self._rest: Iterator[tuple[int, _Mixed | _Repeated]] | None = self._plan()
        self._planning = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return GrowingOrder, (self._sizes, self._births, self._seed, self._grid)

    def _plan_until(self, k: int) -> None:
        """Plan segments until one begins after position ``k``, or the last one is planned."""
        with self._planning:
            while self._rest is not None and (not self._starts or self._starts[-1] <= k):
                planned = next(self._rest, None)
                if planned is None:
                    self._rest = None
                    return
                self._segments.append(planned[1])  # before its start, by which other threads find it
                self._starts.append(planned[0])

    def _plan(self) -> Iterator[tuple[int, _Mixed | _Repeated]]:
        """Walk through births and ends of passes, giving the segments between them."""
        number = 0  # of the pass
        blocks: list[_Block] = []
        pool = 0
        for block, (size, k) in enumerate(zip(self._sizes, self._births, strict=True)):
            blocks.append(_Block(pool, size, self._block_key(number, pool)))
            pool += size
            until = self._births[block + 1] if block + 1 < len(self._births) else None
            while k != until and blocks[0].size < pool:
                unseen = [b.size - b.cursor for b in blocks]
                length = sum(unseen)
                if until is not None:
                    length = min(length, until - k)
                if self._grid is not None:
                    length = min(length, self._grid)  # births and so these segments begin on the grid
                shares = apportion(unseen, length)
                yield k, self._mixed(k, length, blocks, shares)
                for drawn, share in zip(blocks, shares, strict=True):
                    drawn.cursor += share
                blocks = [b for b in blocks if b.cursor < b.size]
                k += length
                if not blocks:
                    if k == until:
                        break
                    number += 1
                    blocks = [_Block(0, pool, self._block_key(number, 0))]
            if k == until:
                continue
            # One block is the whole pool: the first, or all of them merged after a pass that ended just now.
            origin = k - blocks[0].cursor
            yield k, _Repeated(origin, number, pool, self._base_key)
            if until is not None:
                passes, cursor = divmod(until - origin, pool)
                number += passes
                blocks = [_Block(0, pool, self._block_key(number, 0), cursor)]
                if cursor == 0:
                    # What is born at the very end of a pass still belongs to that pass: the pool is not exhausted.
                    number -= 1
                    blocks = []

    def _block_key(self, number: int, start: int) -> int:
        """The key of a block's permutation in a pass; the block at slot 0 has the key that a repeated segment uses."""
        if start == 0:
            return int(epoch_keys(self._base_key, np.array([number], dtype=np.int64)).item())
        return derive(self._seed, "growing order, block", number, start)

    def _mixed(self, k: int, length: int, blocks: list[_Block], shares: list[int]) -> _Mixed:
        taken = [(block, share) for block, share in zip(blocks, shares, strict=True) if share]
        return _Mixed(
            first_k=k,
            length=length,
            mix_key=derive(self._seed, "growing order, mix", k),
            starts=np.array([block.start for block, _ in taken], dtype=np.int64),
            sizes=np.array([block.size for block, _ in taken], dtype=np.int64),
            keys=np.array([block.key for block, _ in taken], dtype=np.uint64),
            cursors=np.array([block.cursor for block, _ in taken], dtype=np.int64),
            bounds=np.cumsum([share for _, share in taken], dtype=np.int64),
        )

    def __call__(self, k: IntArray) -> IntArray:
        """The slots at positions ``k`` (one dimension, each at least 0); int64 of the same length."""
        if not len(k):
            return np.empty(0, dtype=np.int64)
        low, high = int(k.min()), int(k.max())
        self._plan_until(high)
        first = bisect.bisect_right(self._starts, low) - 1
        if first + 1 == len(self._starts) or high < self._starts[first + 1]:
            return self._segments[first].slots(k)
        which = np.searchsorted(np.array(self._starts, dtype=np.int64), k, side="right") - 1
        slots = np.empty(len(k), dtype=np.int64)
        for number in sorted(set(which.tolist())):
            here = which == number
            slots[here] = self._segments[number].slots(k[here])
        return slots

    def pool_at(self, k: IntArray) -> IntArray:
        """How many slots are in the pool at each position: slots ``0`` to ``pool_at(k) - 1`` may appear at ``k``."""
        return np.asarray(self._pools[np.searchsorted(self._births, k, side="right") - 1], dtype=np.int64)

    def digest(self) -> str:
        """A digest of sizes, births and seed."""
        return digest_of("growing", self._sizes, self._births, self._seed, self._grid)
