"""What the algorithms share that send a few bits an element and a scale a block."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField
from penstock.compression.algorithms._blocks import as_flat, tiles
from penstock.compression.kernels import BlockKernels, kernels_for


class BlockQuantiser(CompressionAlgorithm):
    """Codes of :attr:`bits` bits and one float32 scale per block of consecutive elements.

    A block with a NaN or infinity has a non-finite scale, so the receiver sees the whole block as not finite. A rest
    shorter than a block is a block of its own.

    Args:
        block_size: Elements that share a scale; a multiple of ``8 / bits``.
    """

    bits: ClassVar[int]

    def __init__(self, *, block_size: int) -> None:
        unit = 8 // self.bits
        whole = isinstance(block_size, int) and not isinstance(block_size, bool)
        if not whole or block_size < unit or block_size % unit:
            raise ValueError(f"block_size must be a positive multiple of {unit} (whole bytes), got {block_size!r}")
        self.block_size = block_size

    def payload_layout(self, numel: int) -> list[PayloadField]:
        """``scales`` float32 ``[ceil(numel / block_size)]`` and ``codes`` uint8 ``[ceil(numel * bits / 8)]``."""
        return [
            PayloadField("scales", torch.float32, (-(-numel // self.block_size),)),
            PayloadField("codes", torch.uint8, (-(-numel * self.bits // 8),)),
        ]

    def compress(self, tensor: Tensor) -> Payload:
        """Scales and codes."""
        flat = as_flat(tensor)
        scales, codes = self._empty_payload(flat)
        kernels = self._kernels(flat)
        if kernels is not None:
            kernels.encode(flat, None, scales, codes, self.block_size)
            return {"scales": scales, "codes": codes}
        for start, rows, length in tiles(flat.numel(), self.block_size, flat.device):
            blocks = flat[start : start + rows * length].view(rows, length)
            self._encode(blocks, *self._parts(scales, codes, start, rows, length), start=start)
        return {"scales": scales, "codes": codes}

    def compress_with_memory(self, tensor: Tensor, memory: Tensor) -> Payload:
        """Compress, and subtract what is sent, tile by tile; a non-finite block leaves its memory as it was."""
        flat, owed = as_flat(tensor), memory.view(-1)
        scales, codes = self._empty_payload(flat)
        kernels = self._kernels(flat, owed)
        if kernels is not None:
            kernels.encode(flat, owed, scales, codes, self.block_size)
            return {"scales": scales, "codes": codes}
        for start, rows, length in tiles(flat.numel(), self.block_size, flat.device):
            part = owed[start : start + rows * length].view(rows, length)
            total = part + flat[start : start + rows * length].view(rows, length)
            tile_scales, tile_codes = self._parts(scales, codes, start, rows, length)
            self._encode(total, tile_scales, tile_codes, start=start)
            total -= self._decode(tile_scales, tile_codes, torch.empty_like(total))
            # Only a GPU does this always: looking first would wait for it.
            if flat.device.type != "cpu" or not bool(torch.isfinite(tile_scales).all()):
                total = torch.where(torch.isfinite(tile_scales), total, part)
            part.copy_(total)
        return {"scales": scales, "codes": codes}

    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """Codes times scales."""
        if out.dtype not in (torch.float32, torch.float64):
            return out.copy_(self.decompress(payload, torch.empty_like(out, dtype=torch.float32)))
        flat = out.view(-1)
        kernels = self._kernels(flat)
        if kernels is not None:
            kernels.decode(payload["scales"], payload["codes"], flat, self.block_size, add=False)
            return out
        for start, rows, length in tiles(flat.numel(), self.block_size, flat.device):
            blocks = flat[start : start + rows * length].view(rows, length)
            self._decode(*self._parts(payload["scales"], payload["codes"], start, rows, length), blocks)
        return out

    def decompress_add(self, payload: Payload, out: Tensor) -> Tensor:
        """Add what a receiver sees, tile by tile."""
        if out.dtype not in (torch.float32, torch.float64):
            return super().decompress_add(payload, out)
        flat = out.view(-1)
        kernels = self._kernels(flat)
        if kernels is not None:
            kernels.decode(payload["scales"], payload["codes"], flat, self.block_size, add=True)
            return out
        for start, rows, length in tiles(flat.numel(), self.block_size, flat.device):
            blocks = flat[start : start + rows * length].view(rows, length)
            parts = self._parts(payload["scales"], payload["codes"], start, rows, length)
            blocks += self._decode(*parts, torch.empty_like(blocks))
        return out

    @abstractmethod
    def _encode(self, blocks: Tensor, scales: Tensor, codes: Tensor, *, start: int) -> None:
        """Fill in scales ``[rows, 1]`` and codes ``[rows, bytes]`` of ``blocks`` ``[rows, length]``, only read.

        ``start`` is the first element's place in the tensor.
        """

    @abstractmethod
    def _decode(self, scales: Tensor, codes: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` ``[rows, length]`` with what a receiver sees, and return it."""

    def _kernels(self, *tensors: Tensor) -> BlockKernels | None:
        """Kernels that do the same in fewer passes over memory, where there are some."""
        return kernels_for(self.name, None, *tensors, block_size=self.block_size)

    def _empty_payload(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        scales, codes = self.payload_layout(flat.numel())
        return (
            torch.empty(scales.shape, dtype=scales.dtype, device=flat.device),
            torch.empty(codes.shape, dtype=codes.dtype, device=flat.device),
        )

    def _parts(self, scales: Tensor, codes: Tensor, start: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """The scales ``[rows, 1]`` and codes ``[rows, bytes]`` of a tile."""
        row, width, first = start // self.block_size, -(-length * self.bits // 8), start * self.bits // 8
        return scales[row : row + rows, None], codes[first : first + rows * width].view(rows, width)

    def _largest_block(self, shape: Sequence[int] | int) -> int:
        """Elements of the largest block of a tensor of this shape; at least 1."""
        return max(1, min(self.block_size, shape if isinstance(shape, int) else math.prod(shape)))
