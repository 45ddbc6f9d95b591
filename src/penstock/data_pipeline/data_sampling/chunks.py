"""Batch after batch from an order that is cheaper to ask for many positions at once."""

from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.data_sampling.order import IntArray, Order
from penstock.data_pipeline.data_sampling.skips import SkipRanges

_CHUNK: Final = 1536


class ChunkedOrder:
    """The samples at any positions of a run.

    Batches are asked for one after another: whole chunks are worked out at once and the last one is kept, since a small
    call costs hardly less than one of a few thousand positions.

    Args:
        order: The order.
        skips: Which places of it the run leaves out.
        batch_size: Positions that are asked for at once, usually.
    """

    def __init__(self, order: Order, skips: SkipRanges, batch_size: int) -> None:
        self._order, self._skips = order, skips
        # In a small pool a chunk would run through many epochs that nobody asked for.
        self._size = min(_CHUNK, max(batch_size, order.epoch_size))
        self.forget()

    def forget(self) -> None:
        """Keep no chunk: the order is another one from here on."""
        self._chunk: tuple[int, IntArray] = (-1, np.empty(0, dtype=np.int64))

    def __call__(self, k: npt.ArrayLike) -> IntArray:
        """The samples at positions ``k``, of any shape; int64 of the same shape.

        Raises:
            ValueError: A position is negative or not an integer.
        """
        positions = np.asarray(k)
        if positions.dtype.kind not in "iu" and positions.size:
            raise ValueError(f"positions are integers, got {positions.dtype}")
        flat = positions.reshape(-1).astype(np.int64)
        if not flat.size:
            return np.empty(positions.shape, dtype=np.int64)
        low, high = int(flat.min()), int(flat.max())
        if low < 0:
            raise ValueError(f"positions count from 0, got {low}")
        size = self._size
        first, last = low // size, high // size
        if last - first > 1:
            return self._order(self._skips.places(flat)).reshape(positions.shape)
        if first == last:
            return self._chunk_at(first)[flat - first * size].reshape(positions.shape)
        beyond = flat >= last * size
        result = np.empty(len(flat), dtype=np.int64)
        result[~beyond] = self._chunk_at(first)[flat[~beyond] - first * size]
        result[beyond] = self._chunk_at(last)[flat[beyond] - last * size]
        return result.reshape(positions.shape)

    def _chunk_at(self, number: int) -> IntArray:
        known, samples = self._chunk  # read once: another thread may put another chunk in its place
        if known != number:
            start = number * self._size
            samples = self._order(self._skips.places(np.arange(start, start + self._size, dtype=np.int64)))
            self._chunk = (number, samples)
        return samples
