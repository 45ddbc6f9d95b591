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
    call costs hardly less than one of a few thousand positions. A chunk ends where its epoch ends: the next one, for
    which an order may have to sort all samples, is worked out if it is asked for.

    Args:
        order: The order.
        skips: Which places of it the run leaves out.
    """

    def __init__(self, order: Order, skips: SkipRanges) -> None:
        self._order, self._skips = order, skips
        self._epoch_size = order.epoch_size
        self._size = max(1, min(_CHUNK, order.epoch_size))
        self._per_epoch = -(-self._epoch_size // self._size)
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
        places = self._skips.places(flat)
        first, last = (self._number_at(int(place)) for place in self._skips.places(np.array([low, high])))
        if last - first > 1:
            return self._order(places).reshape(positions.shape)
        if first == last:
            return self._in_chunk(first, places).reshape(positions.shape)
        beyond = places >= self._start(last)
        result = np.empty(len(flat), dtype=np.int64)
        result[~beyond] = self._in_chunk(first, places[~beyond])
        result[beyond] = self._in_chunk(last, places[beyond])
        return result.reshape(positions.shape)

    def _number_at(self, place: int) -> int:
        """The chunk that a place of the order lies in."""
        epoch, rest = divmod(place, self._epoch_size)
        return epoch * self._per_epoch + rest // self._size

    def _start(self, number: int) -> int:
        """The first place of a chunk."""
        epoch, part = divmod(number, self._per_epoch)
        return epoch * self._epoch_size + part * self._size

    def _in_chunk(self, number: int, places: IntArray) -> IntArray:
        """The samples at places of one chunk."""
        known, samples = self._chunk  # read once: another thread may put another chunk in its place
        start = self._start(number)
        if known != number:
            samples = self._order(np.arange(start, self._start(number + 1), dtype=np.int64))
            self._chunk = (number, samples)
        return np.asarray(samples[places - start], dtype=np.int64)
