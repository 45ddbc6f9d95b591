"""Compiled by Numba: read tensor and memory once, write memory and codes once; all else stays in the nearest cache.

Loops over a block are written so that the compiler makes vector instructions of them: no branch inside, no order that
floating-point arithmetic would have to keep (sums go by lanes, see ``sum_rows``).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]

# Without "fastmath" nothing is reordered or fused: the bits are those of torch and numpy.
_compile = numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)


def _jit(function: Function) -> Function:
    return cast(Function, _compile(function))


_GATHER_BITS = np.uint64(0x0102040810204080)
"""Multiplies eight bytes of 0 or 1 so that they meet, as bits, in the highest byte."""
_SPREAD = np.uint64(0x0101010101010101)
_SELECT = np.uint64(0x8040201008040201)
_ROUND = np.float32(12582912.0)
"""Added and subtracted again, it leaves the nearest whole number (to even) of anything below 2**22."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_LANES = 64
_SMALLEST = np.float32(2.0**-100)


@_jit
def _sum(y: F32Array, lanes: F32Array, squares: bool) -> Any:
    """Sum of magnitudes or squares; ``lanes`` is room for 64 numbers."""
    lanes[:] = 0
    count, done = y.size, 0
    if not squares:
        while done + 8 * _LANES <= count:  # eight additions while a lane is at hand
            r = y[done : done + 8 * _LANES]
            for j in range(_LANES):
                four = (((lanes[j] + abs(r[j])) + abs(r[64 + j])) + abs(r[128 + j])) + abs(r[192 + j])
                lanes[j] = (((four + abs(r[256 + j])) + abs(r[320 + j])) + abs(r[384 + j])) + abs(r[448 + j])
            done += 8 * _LANES
    while done < count:
        r = y[done : min(done + _LANES, count)]
        if squares:
            for j in range(r.size):
                lanes[j] += r[j] * r[j]
        else:
            for j in range(r.size):
                lanes[j] += abs(r[j])
        done += _LANES
    width = _LANES
    while width > 1:
        width //= 2
        for j in range(width):
            lanes[j] += lanes[width + j]
    return lanes[0]


@_jit
def _mix(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


@_jit
def _encode_onebit(
    x: F32Array, memory: F32Array, remember: bool, scales: F32Array, codes: U8Array, block: int, rms: bool
) -> None:
    y = np.empty(block, np.float32)
    pattern = y.view(np.uint32)
    lanes = np.empty(_LANES, np.float32)
    bits = np.zeros(block, np.uint8)
    words = bits.view(np.uint64)
    for b in range(scales.size):
        start = b * block
        count = min(block, x.size - start)
        x_b = x[start : start + count]
        m_b = memory[start : start + count] if remember else memory
        if remember:
            for j in range(count):
                y[j] = x_b[j] + m_b[j]
        else:
            for j in range(count):
                y[j] = x_b[j]
        mean = _sum(y[:count], lanes, rms) / np.float32(count)
        scale = np.sqrt(mean) if rms else mean
        scales[b] = scale
        if count < block:
            bits[:] = 0
        for j in range(count):
            bits[j] = np.uint8(pattern[j] >> np.uint32(31))
        c_b = codes[start // 8 : (start + count + 7) // 8]
        for j in range(c_b.size):
            c_b[j] = np.uint8((words[j] * _GATHER_BITS) >> np.uint64(56))
        if remember and np.isfinite(scale):
            for j in range(count):
                m_b[j] = y[j] - np.copysign(scale, y[j])


@_jit
def _decode_onebit(scales: F32Array, codes: U8Array, out: F32Array, block: int, add: bool) -> None:
    pattern = out.view(np.uint32)
    scale_bits = scales.view(np.uint32)
    words = np.empty((block + 7) // 8, np.uint64)
    bits = words.view(np.uint8)
    for b in range(scales.size):
        start = b * block
        count = min(block, out.size - start)
        c_b = codes[start // 8 : (start + count + 7) // 8]
        for j in range(c_b.size):
            words[j] = (np.uint64(c_b[j]) * _SPREAD) & _SELECT
        if add:
            o_b = out[start : start + count]
            scale = scales[b]
            for j in range(count):
                o_b[j] += -scale if bits[j] != 0 else scale
        else:
            p_b = pattern[start : start + count]
            positive = scale_bits[b]
            for j in range(count):
                p_b[j] = positive ^ (np.uint32(bits[j] != 0) << np.uint32(31))


@_jit
def _encode_integer(
    x: F32Array,
    memory: F32Array,
    remember: bool,
    scales: F32Array,
    codes: U8Array,
    block: int,
    bits: int,
    stochastic: bool,
    key: np.uint64,
) -> None:
    top = np.float32(127) if bits == 8 else np.float32(7)
    y = np.empty(block, np.float32)
    pattern = y.view(np.int32)
    levels = np.empty(block, np.float32)
    largest = np.empty(1, np.float32)
    largest_bits = largest.view(np.int32)
    for b in range(scales.size):
        start = b * block
        count = min(block, x.size - start)
        x_b = x[start : start + count]
        m_b = memory[start : start + count] if remember else memory
        if remember:
            for j in range(count):
                y[j] = x_b[j] + m_b[j]
        else:
            for j in range(count):
                y[j] = x_b[j]
        # As whole numbers the patterns of magnitudes are in order, with infinity and NaN at the end.
        highest = np.int32(0)
        for j in range(count):
            highest = max(highest, pattern[j] & np.int32(0x7FFFFFFF))
        largest_bits[0] = highest
        scale = largest[0] / top
        scales[b] = scale
        finite = np.isfinite(largest[0])
        if finite and largest[0] >= _SMALLEST:
            factor = top / largest[0]
            if stochastic:
                for j in range(count):
                    word = _mix(_mix(np.uint64(start + j) * _GOLDEN + key) + _GOLDEN)
                    dither = np.float32(word >> np.uint64(40)) * np.float32(2.0**-24)
                    levels[j] = min(max(np.floor(y[j] * factor + dither), -top), top)
            else:
                for j in range(count):
                    levels[j] = (y[j] * factor + _ROUND) - _ROUND
        else:
            for j in range(count):
                levels[j] = np.float32(0)
        if bits == 8:
            c_b = codes[start : start + count]
            for j in range(count):
                c_b[j] = np.uint8(np.int8(levels[j]))
        else:
            width = (count + 1) // 2
            c_b = codes[start // 2 : start // 2 + width]
            if count % 2:
                levels[count] = np.float32(0)
            for j in range(width):
                low = np.uint8(np.int8(levels[j])) & np.uint8(15)
                c_b[j] = low | (np.uint8(np.int8(levels[width + j])) << np.uint8(4))
        if remember and finite:
            for j in range(count):
                m_b[j] = y[j] - levels[j] * scale


@_jit
def _decode_integer(scales: F32Array, codes: U8Array, out: F32Array, block: int, bits: int, add: bool) -> None:
    levels = np.empty(block + 1, np.float32)
    for b in range(scales.size):
        start = b * block
        count = min(block, out.size - start)
        o_b = out[start : start + count]
        if bits == 8:
            c_b = codes[start : start + count].view(np.int8)
            for j in range(count):
                levels[j] = np.float32(c_b[j])
        else:
            width = (count + 1) // 2
            n_b = codes[start // 2 : start // 2 + width].view(np.int8)
            for j in range(width):
                levels[j] = np.float32(np.int8(n_b[j] << np.int8(4)) >> np.int8(4))
                levels[width + j] = np.float32(n_b[j] >> np.int8(4))
        scale = scales[b]
        if add:
            for j in range(count):
                o_b[j] += levels[j] * scale
        else:
            for j in range(count):
                o_b[j] = levels[j] * scale


class _OneBitKernels:
    def __init__(self, *, rms: bool) -> None:
        self._rms = rms

    def encode(self, tensor: Tensor, memory: Tensor | None, scales: Tensor, codes: Tensor, block_size: int) -> None:
        owed = scales if memory is None else memory
        _encode_onebit(
            tensor.numpy(), owed.numpy(), memory is not None, scales.numpy(), codes.numpy(), block_size, self._rms
        )

    def decode(self, scales: Tensor, codes: Tensor, out: Tensor, block_size: int, *, add: bool) -> None:
        _decode_onebit(scales.numpy(), codes.numpy(), out.numpy(), block_size, add)


class _IntegerKernels:
    def __init__(self, bits: int, key: int | None) -> None:
        self._bits = bits
        self._key = key

    def encode(self, tensor: Tensor, memory: Tensor | None, scales: Tensor, codes: Tensor, block_size: int) -> None:
        owed = scales if memory is None else memory
        _encode_integer(
            tensor.numpy(),
            owed.numpy(),
            memory is not None,
            scales.numpy(),
            codes.numpy(),
            block_size,
            self._bits,
            self._key is not None,
            np.uint64(self._key or 0),
        )

    def decode(self, scales: Tensor, codes: Tensor, out: Tensor, block_size: int, *, add: bool) -> None:
        _decode_integer(scales.numpy(), codes.numpy(), out.numpy(), block_size, self._bits, add)


@cache
def _onebit(rms: bool) -> _OneBitKernels:
    return _OneBitKernels(rms=rms)


def find(name: str, key: int | None) -> _OneBitKernels | _IntegerKernels | None:
    """The kernels of an algorithm; None for one that has none."""
    if name in ("onebit", "onebit_rms"):
        return _onebit(name == "onebit_rms")
    bits = {"int8": 8, "int4": 4}.get(name)
    return None if bits is None else _IntegerKernels(bits, key)
