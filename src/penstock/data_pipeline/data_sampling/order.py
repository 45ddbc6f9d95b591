"""Order as a function: which sample is the k-th of the run.

An :class:`Order` maps positions ``k`` (0, 1, 2, ... over the whole run, through all its epochs) to samples. It keeps no
state: the answer depends only on what the order was made from and on ``k``, so any process can ask for any position.
"""

import hashlib
from typing import Protocol

import numpy as np
import numpy.typing as npt

from penstock._core.keys import derive, random_words
from penstock.data_pipeline.data_sampling.permutation import permute

IntArray = npt.NDArray[np.int64]


class Order(Protocol):
    """Which sample stands at each position of the run."""

    epoch_size: int
    """Positions of one epoch; the order goes on beyond it, epoch after epoch."""

    def __call__(self, k: IntArray) -> IntArray:
        """The samples at positions ``k`` (one dimension, each at least 0, in any order); int64 of the same length."""

    def digest(self) -> str:
        """A hexadecimal digest of all that the order depends on; equal digests mean equal orders."""


def digest_of(*parts: object) -> str:
    """A hexadecimal digest of numbers, strings and arrays."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype.str}{part.shape}:".encode())
            state.update(np.ascontiguousarray(part).data)
        else:
            state.update(f"{type(part).__name__}:{part!r};".encode())
    return state.hexdigest()


class SequentialOrder:
    """Samples 0, 1, 2, ..., again and again.

    Args:
        size: How many samples there are.
    """

    def __init__(self, size: int) -> None:
        self.epoch_size = size

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        return k % self.epoch_size

    def digest(self) -> str:
        """See :class:`Order`."""
        return digest_of("sequential", self.epoch_size)


class ShuffledOrder:
    """Each epoch is a keyed permutation of its own.

    Args:
        size: How many samples there are.
        seed: The key of all permutations.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.epoch_size = size
        self._seed = seed
        self._key = derive(seed, "shuffled order")

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        epoch, rank = np.divmod(k, self.epoch_size)
        return permute(rank, self.epoch_size, epoch_keys(self._key, epoch))

    def digest(self) -> str:
        """See :class:`Order`."""
        return digest_of("shuffled", self.epoch_size, self._seed)


class WarmedUpOrder:
    """One order up to a place, and from there on another one from its beginning.

    Args:
        first: The order of the warm-up.
        then: The order of the rest.
        until: Where the warm-up ends, in positions.
    """

    def __init__(self, first: Order, then: Order, until: int) -> None:
        self.first = first
        self._then = then
        self._until = until
        self.epoch_size = then.epoch_size

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        early = k < self._until
        if not early.any():
            return self._then(k - self._until)
        if early.all():
            return self.first(k)
        result = np.empty(len(k), dtype=np.int64)
        result[early] = self.first(k[early])
        result[~early] = self._then(k[~early] - self._until)
        return result

    def digest(self) -> str:
        """See :class:`Order`."""
        return digest_of("warmed up", self.first.digest(), self._then.digest(), self._until)


def epoch_keys(key: int, epoch: IntArray) -> npt.NDArray[np.uint64]:
    """The key of each element's epoch: one key for all where the epoch is one, which is much cheaper to use."""
    if epoch.size and epoch[0] == epoch[-1] and bool((epoch == epoch[0]).all()):
        epoch = epoch[:1].reshape(())
    return random_words(key, epoch)
