"""Compiled by Triton: one program a block; tensor and memory are read once, memory and codes written once.

The bits are those of torch but for a scale's last one, because a GPU sums in an order of its own.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_SMALLEST: Final = tl.constexpr(2.0**-100)
_INFINITY: Final = tl.constexpr(float("inf"))
_NAN: Final = tl.constexpr(float("nan"))
_ROUND: Final = tl.constexpr(12582912.0)
"""Added and subtracted again, it leaves the nearest whole number (to even) of anything below 2**22."""


@triton.jit
def _total(x_ptr, memory_ptr, places, inside, remember: tl.constexpr):
    x = tl.load(x_ptr + places, mask=inside, other=0.0)
    if remember:
        x = x + tl.load(memory_ptr + places, mask=inside, other=0.0)
    return x


@triton.jit
def _encode_onebit(
    x_ptr,
    memory_ptr,
    scales_ptr,
    codes_ptr,
    numel,
    block,
    remember: tl.constexpr,
    rms: tl.constexpr,
    room: tl.constexpr,
):
    """``room``: a power of two of at least ``block`` elements, itself a multiple of 8."""
    b = tl.program_id(0).to(tl.int64)
    count = tl.minimum(block, numel - b * block)
    byte, bit = tl.arange(0, room // 8)[:, None], tl.arange(0, 8)[None, :]
    inside = byte * 8 + bit < count
    places = b * block + byte * 8 + bit
    y = _total(x_ptr, memory_ptr, places, inside, remember)
    if rms:
        scale = tl.sqrt_rn(tl.sum(tl.sum(y * y, 1), 0) / count.to(tl.float32))
    else:
        scale = tl.sum(tl.sum(tl.abs(y), 1), 0) / count.to(tl.float32)
    tl.store(scales_ptr + b, scale)
    negative = (y.to(tl.int32, bitcast=True) < 0) & inside
    codes = tl.sum(negative.to(tl.int32) << bit, 1)
    first = tl.arange(0, room // 8)
    tl.store(codes_ptr + b * (block // 8) + first, codes.to(tl.uint8), mask=first < (count + 7) // 8)
    if remember:
        left = y - tl.where(negative, -scale, scale)
        tl.store(memory_ptr + places, left, mask=inside & (tl.abs(left) < _INFINITY))


@triton.jit
def _decode_onebit(scales_ptr, codes_ptr, out_ptr, numel, block, add: tl.constexpr, room: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, room)
    inside = places < tl.minimum(block, numel - b * block)
    scale = tl.load(scales_ptr + b)
    codes = tl.load(codes_ptr + b * (block // 8) + places // 8, mask=inside, other=0).to(tl.int32)
    seen = tl.where((codes >> (places % 8)) & 1 != 0, -scale, scale)
    if add:
        seen += tl.load(out_ptr + b * block + places, mask=inside, other=0.0)
    tl.store(out_ptr + b * block + places, seen, mask=inside)


@triton.jit
def _encode_integer(
    x_ptr,
    memory_ptr,
    scales_ptr,
    codes_ptr,
    numel,
    block,
    top,
    remember: tl.constexpr,
    bits: tl.constexpr,
    room: tl.constexpr,
):
    """A row of codes for each part of a byte; ``room``: a power of two of at least the bytes of a block."""
    b = tl.program_id(0).to(tl.int64)
    count = tl.minimum(block, numel - b * block)
    per_byte: tl.constexpr = 8 // bits
    width = (count + per_byte - 1) // per_byte
    part, byte = tl.arange(0, per_byte)[:, None], tl.arange(0, room)[None, :]
    inside = (byte < width) & (part * width + byte < count)
    places = b * block + part * width + byte
    y = _total(x_ptr, memory_ptr, places, inside, remember)
    infinite = tl.sum(tl.sum((tl.abs(y) < _INFINITY).to(tl.int32), 1), 0) < per_byte * room  # or NaN
    largest = tl.where(infinite, _NAN, tl.max(tl.max(tl.abs(y), 1), 0))
    scale = largest / top
    tl.store(scales_ptr + b, scale)
    factor = tl.where(largest >= _SMALLEST, top / largest, 0.0)
    levels = tl.where(y * factor == y * factor, (y * factor + _ROUND) - _ROUND, 0.0)
    numbers = levels.to(tl.int32) & ((1 << bits) - 1)
    first = tl.arange(0, room)
    codes = tl.sum(numbers << (part * bits), 0)
    tl.store(codes_ptr + b * (block // per_byte) + first, codes.to(tl.uint8), mask=first < width)
    if remember:
        left = y - levels * scale
        tl.store(memory_ptr + places, left, mask=inside & (tl.abs(left) < _INFINITY))


@triton.jit
def _decode_integer(
    scales_ptr, codes_ptr, out_ptr, numel, block, add: tl.constexpr, bits: tl.constexpr, room: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    count = tl.minimum(block, numel - b * block)
    per_byte: tl.constexpr = 8 // bits
    width = (count + per_byte - 1) // per_byte
    part, byte = tl.arange(0, per_byte)[:, None], tl.arange(0, room)[None, :]
    inside = (byte < width) & (part * width + byte < count)
    places = b * block + part * width + byte
    codes = tl.load(codes_ptr + b * (block // per_byte) + byte, mask=byte < width, other=0).to(tl.int32)
    numbers = (codes << (32 - bits - part * bits)) >> (32 - bits)
    seen = numbers.to(tl.float32) * tl.load(scales_ptr + b)
    if add:
        seen += tl.load(out_ptr + places, mask=inside, other=0.0)
    tl.store(out_ptr + places, seen, mask=inside)


class _Kernels:
    """Launches the two kernels of an algorithm, a program for each block.

    Args:
        encode: The compressing kernel.
        decode: The decompressing kernel.
        options: Constants of the first.
        decode_options: Constants of the second.
        room_for: The constant ``room`` of both for a block's size, but for rounding up to a power of two.
    """

    def __init__(
        self,
        encode: Any,
        decode: Any,
        *,
        options: dict[str, Any],
        decode_options: dict[str, Any],
        room_for: Callable[[int], int],
    ) -> None:
        self._encode = encode
        self._decode = decode
        self._options = options
        self._decode_options = decode_options
        self._room_for = room_for

    def encode(self, tensor: Tensor, memory: Tensor | None, scales: Tensor, codes: Tensor, block_size: int) -> None:
        if not scales.numel():
            return
        owed = scales if memory is None else memory
        room = triton.next_power_of_2(self._room_for(block_size))
        remember = memory is not None
        launch = self._encode[(scales.numel(),)]
        with torch.cuda.device_of(tensor):  # which need not be the current one, where Triton would launch
            launch(
                tensor, owed, scales, codes, tensor.numel(), block_size, remember=remember, room=room, **self._options
            )

    def decode(self, scales: Tensor, codes: Tensor, out: Tensor, block_size: int, *, add: bool) -> None:
        if not scales.numel():
            return
        room = triton.next_power_of_2(self._room_for(block_size))
        launch = self._decode[(scales.numel(),)]
        with torch.cuda.device_of(out):
            launch(scales, codes, out, out.numel(), block_size, add=add, room=room, **self._decode_options)


def find(name: str, key: int | None) -> _Kernels | None:
    """The kernels of an algorithm; None for one that has none, and for random rounding."""
    if name in ("onebit", "onebit_rms"):
        options = {"rms": name == "onebit_rms"}
        return _Kernels(
            _encode_onebit, _decode_onebit, options=options, decode_options={}, room_for=lambda block: max(block, 8)
        )
    bits = {"int8": 8, "int4": 4}.get(name)
    if bits is None or key is not None:
        return None
    return _Kernels(
        _encode_integer,
        _decode_integer,
        options={"bits": bits, "top": float((1 << (bits - 1)) - 1)},
        decode_options={"bits": bits},
        room_for=lambda block: block * bits // 8,
    )
