"""Many keyed permutations at once: each element names its own size and key.

The sampler draws from up to 256 blocks, or from many epochs, in one call; one permutation at a time would cost a
hundred numpy calls each. This is a Feistel network with cycle
walking (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), whose halves need not have the same
width: so the network's domain is less than twice the size and an index walks one extra step on average at most.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

_ROUNDS: Final = 8
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
_SPREAD_AGAIN: Final = np.uint64(0xBF58476D1CE4E5B9)
_HALF: Final = np.uint64(32)
_ROUND_STEP: Final = 0xD1B54A32D192ED03
_ONE: Final = np.uint64(1)

U64 = npt.NDArray[np.uint64]


def permute(index: npt.NDArray[np.int64], size: npt.ArrayLike, key: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Send each index to its place under the permutation of ``range(size)`` that ``key`` names.

    Args:
        index: One dimension of int64, each in ``range(size)``.
        size: One size for all, or an array like ``index``; at least 1 and at most ``2**62``.
        key: One 64-bit key for all, or an array like ``index``, from ``derive`` or ``random_words``: keys must be well
            mixed already.

    Returns:
        int64 like ``index``; for one size and key, a bijection on ``range(size)``.
    """
    sizes, keys = np.asarray(size, dtype=np.uint64), np.asarray(key, dtype=np.uint64)
    network = _Network(sizes, keys)
    x = network(index.astype(np.uint64))
    outside = np.flatnonzero(x >= sizes)
    network = network.at(outside)
    while outside.size:
        walked = network(x[outside])
        x[outside] = walked
        left = np.flatnonzero(walked >= network.sizes)
        outside, network = outside[left], network.at(left)
    # A network of few bits favours some places (by up to 7 % at five elements); turning the circle evens them out.
    x += keys % sizes
    np.subtract(x, sizes, out=x, where=x >= sizes)
    return x.astype(np.int64)


class _Network:
    """The Feistel network on the smallest power of two that holds each size; parameters are arrays or scalars."""

    def __init__(self, sizes: U64, keys: U64) -> None:
        self.sizes, self.keys = sizes, keys
        bits = _bit_length(sizes - _ONE)
        self.low_bits = bits >> _ONE
        self.low_mask = (_ONE << self.low_bits) - _ONE
        self.high_mask = (_ONE << (bits - self.low_bits)) - _ONE

    def at(self, places: npt.NDArray[np.intp]) -> "_Network":
        """The network of some of the elements."""
        if self.sizes.ndim == 0 and self.keys.ndim == 0:
            return self
        part = object.__new__(_Network)
        for name, value in vars(self).items():
            setattr(part, name, value if value.ndim == 0 else value[places])
        return part

    def __call__(self, x: U64) -> U64:
        low, high = x & self.low_mask, x >> self.low_bits
        for number in range(_ROUNDS):
            round_key = self.keys ^ np.uint64((number * _ROUND_STEP) & 0xFFFFFFFFFFFFFFFF)
            if number % 2 == 0:
                low ^= _scramble(high, round_key) & self.low_mask
            else:
                high ^= _scramble(low, round_key) & self.high_mask
        result: U64 = (high << self.low_bits) | low
        return result


def _scramble(half: U64, round_key: Any) -> U64:
    """32 bits that depend on all bits of the half and of the key: the upper halves of two products in turn."""
    x = half * _SPREAD
    x += round_key
    x ^= x >> _HALF
    x *= _SPREAD_AGAIN
    x >>= _HALF
    return x


def _bit_length(x: U64) -> U64:
    """How many bits each number has, 0 for 0."""
    # float64 rounds numbers above 2**53, up to the next power of two at most: take the top and the low half apart.
    high, low = x >> np.uint64(32), x & np.uint64(0xFFFFFFFF)
    bits = np.where(high > 0, np.frexp(high.astype(np.float64))[1] + 32, np.frexp(low.astype(np.float64))[1])
    return np.asarray(bits, dtype=np.uint64)
