"""Keyed randomness: every random choice is a pure function of *what it decides*.

A *key* is a 64-bit integer made from a few integers and strings (:func:`derive`). From a key come a stream
of counter-based random words (:func:`random_words`) or a seeded torch generator (:func:`seed_torch`). No random state
is carried along, so nothing has to be saved, and the answer is the same on any rank, worker or micro-batch that asks.

The mixer is SplitMix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014).
"""

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

U64Array = npt.NDArray[np.uint64]

MASK64: Final = (1 << 64) - 1
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX2: Final = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def derive(*parts: int | str) -> int:
    """Make a 64-bit key from integers and strings; the order and the types of the parts count.

    Args:
        parts: Integers (any size that fits 64 bits, signed or not) and strings. At least one.

    Returns:
        An integer in ``[0, 2**64)``.
    """
    if not parts:
        raise ValueError("derive() needs at least one part to make a key from")
    text = bytearray()
    for part in parts:
        if isinstance(part, str):
            encoded = part.encode()
            text += b"s" + len(encoded).to_bytes(8, "little") + encoded
        else:
            text += b"i" + (int(part) & MASK64).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def mix(x: U64Array) -> U64Array:
    """SplitMix64's finaliser on an array of 64-bit words: a bijection that scrambles every bit."""
    return _mix_in_place(np.array(x), np.empty_like(x))


def _mix_in_place(x: U64Array, spare: U64Array) -> U64Array:
    """:func:`mix` without new memory, which for long arrays costs more than the arithmetic; returns ``x``."""
    for shift, factor in ((_S30, _MIX1), (_S27, _MIX2)):
        np.right_shift(x, shift, out=spare)
        np.bitwise_xor(x, spare, out=x)
        np.multiply(x, factor, out=x)
    np.right_shift(x, _S31, out=spare)
    return np.bitwise_xor(x, spare, out=x)


def random_words(key: int, counters: npt.NDArray[np.integer]) -> U64Array:
    """Counter-based random 64-bit words: word ``i`` is a pure function of ``(key, counters[i])``.

    Args:
        key: From :func:`derive`.
        counters: Integers of any shape; negative ones wrap modulo ``2**64``.

    Returns:
        An array of ``uint64`` of the same shape.
    """
    state = np.array(counters, dtype=np.uint64)
    np.multiply(state, _GOLDEN, out=state)
    return _words(np.add(state, np.uint64(key & MASK64), out=state))


def random_rows(key: int, starts: U64Array, length: int) -> U64Array:
    """Rows of random words: row ``b`` is ``random_words(key, starts[b] + np.arange(length))``.

    Args:
        key: From :func:`derive`.
        starts: The first counter of each row, ``[B]``; counters wrap modulo ``2**64``.
        length: Words of each row.

    Returns:
        An array of ``uint64``, ``[B, length]``.
    """
    steps = np.arange(length, dtype=np.uint64)
    np.multiply(steps, _GOLDEN, out=steps)
    return _words((starts * _GOLDEN + np.uint64(key & MASK64))[:, None] + steps)


def _words(state: U64Array) -> U64Array:
    """The words of a generator in these states, in their place."""
    spare = np.empty_like(state)
    _mix_in_place(state, spare)
    np.add(state, _GOLDEN, out=state)
    return _mix_in_place(state, spare)


def random_floats(key: int, counters: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Counter-based uniform numbers in ``[0, 1)`` with 53 random bits each; see :func:`random_words`."""
    return (random_words(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_torch(key: int, device: torch.device | None = None) -> None:
    """Seed torch's default generator of the CPU, and of ``device`` if it is a GPU, with a key.

    Seeding costs about a microsecond; saving and restoring a generator's state costs a hundred.
    """
    seed = key & ((1 << 63) - 1)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        torch.cuda.default_generators[index].manual_seed(seed)
