"""One sign bit an element and one scale a block.

Seide et al., "1-bit stochastic gradient descent and its application to data-parallel distributed training of speech
DNNs", Interspeech 2014; with the mean absolute value as scale it is the scaled sign of Karimireddy et al., "Error
feedback fixes SignSGD and other gradient compression schemes", ICML 2019. For a block ``x`` of ``d`` elements the
scale ``|x|_1 / d`` minimises ``|x - s sign(x)|_2``, and what is left over is ``1 - |x|_1**2 / (d |x|_2**2)`` of the
block's energy: a contraction whatever the block. DeepSpeed's scale, ``|x|_2 / sqrt(d)``, keeps the energy instead.
"""

from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField

# Elements handled at a time on the CPU: the working set stays in the second-level cache, so that the several
# operations below cost about one pass over memory.
_TILE: Final = 1 << 18

_BYTE_SIGNS: Final = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(
    np.int8
)
"""The eight signs (+1 or -1) that each byte stands for, ``[256, 8]``."""

_SIGN_TABLES: Final[dict[torch.dtype, npt.NDArray[Any]]] = {
    torch.float32: _BYTE_SIGNS.astype(np.float32),
    torch.float64: _BYTE_SIGNS.astype(np.float64),
}


class OneBit(CompressionAlgorithm):
    """Sign bits with one float32 scale per block of consecutive elements.

    The sign is the float's own sign bit: ``+0.0`` counts as positive, ``-0.0`` as negative. A NaN or infinity makes
    its block's scale non-finite, so the receiver sees the whole block as NaN or infinite.

    Args:
        block_size: Elements that share a scale, a multiple of 8. At 1024 the wire is 1/31 of float32's.
        scale: ``"l1"``, the mean absolute value, has the least error; ``"rms"`` is DeepSpeed's.
    """

    name = "onebit"

    def __init__(self, *, block_size: int = 1024, scale: Literal["l1", "rms"] = "l1") -> None:
        whole = isinstance(block_size, int) and not isinstance(block_size, bool)
        if not whole or block_size < 8 or block_size % 8:
            raise ValueError(f"block_size must be a positive multiple of 8 (whole bytes), got {block_size!r}")
        if scale not in ("l1", "rms"):
            raise ValueError(f"unknown scale {scale!r}; known: 'l1' (mean absolute value), 'rms' (root mean square)")
        self.block_size = block_size
        self.scale: Literal["l1", "rms"] = scale
        self._tile = max(1, _TILE // block_size) * block_size

    def payload_layout(self, numel: int) -> list[PayloadField]:
        """``scales`` float32 ``[ceil(numel / block_size)]`` and ``signs`` uint8 ``[ceil(numel / 8)]``."""
        return [
            PayloadField("scales", torch.float32, (-(-numel // self.block_size),)),
            PayloadField("signs", torch.uint8, (-(-numel // 8),)),
        ]

    def compress(self, tensor: Tensor) -> Payload:
        """Scales and sign bits; bit ``i`` of byte ``j`` is the sign of element ``8 j + i``, set when negative."""
        return self._compress(_as_flat(tensor), leave_residual=False)

    def compress_residual_(self, tensor: Tensor) -> Payload:
        """Compress and subtract what is sent, tile by tile; the residual of a non-finite block is zero."""
        if tensor.dtype not in _SIGN_TABLES:
            return super().compress_residual_(tensor)
        return self._compress(tensor.view(-1), leave_residual=True)

    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """Plus or minus the block's scale."""
        if out.dtype not in _SIGN_TABLES:
            return out.copy_(self.decompress(payload, torch.empty_like(out, dtype=torch.float32)))
        flat, scales, packed = out.view(-1), payload["scales"].to(out.dtype), payload["signs"]
        step = self._step(flat)
        scratch = _scratch_for(flat, step)
        for start in range(0, flat.numel(), step):
            tile = flat[start : start + step]
            signs = _unpack(packed[start // 8 : -(-(start + tile.numel()) // 8)], scratch)[: tile.numel()]
            first = start // self.block_size
            for part, sign, scale in self._blocks(tile, signs, scales[first:]):
                torch.mul(sign, scale, out=part)
        return out

    def _compress(self, flat: Tensor, *, leave_residual: bool) -> Payload:
        scale_field, sign_field = self.payload_layout(flat.numel())
        scales = torch.empty(scale_field.shape, dtype=scale_field.dtype, device=flat.device)
        packed = torch.empty(sign_field.shape, dtype=sign_field.dtype, device=flat.device)
        step = self._step(flat)
        scratch = _scratch_for(flat, step)
        for start in range(0, flat.numel(), step):
            tile = flat[start : start + step]
            tile_packed = packed[start // 8 : -(-(start + tile.numel()) // 8)]
            first = start // self.block_size
            tile_scales = scales[first : first + -(-tile.numel() // self.block_size)]
            for part, room, scale in self._blocks(tile, scratch[: tile.numel()], tile_scales):
                scale.copy_(self._scale_of(part, room))
            _pack(tile, tile_packed)
            if leave_residual:
                signs = _unpack(tile_packed, scratch)[: tile.numel()]
                for part, sign, scale in self._blocks(tile, signs, tile_scales.to(tile.dtype)):
                    part.addcmul_(sign, scale, value=-1.0)
                # Only a GPU does this always: looking first would wait for it.
                if flat.device.type != "cpu" or not bool(torch.isfinite(tile_scales.sum())):
                    tile.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return {"scales": scales, "signs": packed}

    def _step(self, flat: Tensor) -> int:
        """How many elements to handle at a time: a tile on the CPU, everything elsewhere."""
        return self._tile if flat.device.type == "cpu" else max(1, flat.numel())

    def _scale_of(self, blocks: Tensor, room: Tensor) -> Tensor:
        """``[rows, block]`` to ``[rows, 1]``; ``room`` is overwritten."""
        if self.scale == "l1":
            return torch.abs(blocks, out=room).mean(dim=1, keepdim=True)
        return torch.mul(blocks, blocks, out=room).mean(dim=1, keepdim=True).sqrt_()

    def _blocks(self, tile: Tensor, other: Tensor, scales: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Cut two tiles into ``[rows, block]`` views beside their ``[rows, 1]`` scales: whole blocks, then the rest."""
        rows, rest = divmod(tile.numel(), self.block_size)
        whole = rows * self.block_size
        cuts = []
        if rows:
            shape = (rows, self.block_size)
            cuts.append((tile[:whole].view(shape), other[:whole].view(shape), scales[:rows, None]))
        if rest:
            cuts.append((tile[whole:].view(1, rest), other[whole:].view(1, rest), scales[rows : rows + 1, None]))
        return cuts


def _as_flat(tensor: Tensor) -> Tensor:
    """Contiguous, one axis, float32 or float64."""
    flat = tensor.detach().reshape(-1)
    return flat if flat.dtype in _SIGN_TABLES else flat.float()


def _pack(tile: Tensor, out: Tensor) -> None:
    """Sign bits of ``tile`` into ``out`` (uint8), eight to a byte, the last byte filled with zeros."""
    if tile.device.type == "cpu":
        negative = np.signbit(tile.numpy())
        out.copy_(torch.from_numpy(np.packbits(negative, bitorder="little")))
    else:
        _pack_by_torch(tile, out)


def _pack_by_torch(tile: Tensor, out: Tensor) -> None:
    bits = torch.nn.functional.pad(torch.signbit(tile).to(torch.uint8), (0, -tile.numel() % 8)).view(-1, 8)
    torch.sum(bits << torch.arange(8, dtype=torch.uint8, device=tile.device), dim=1, dtype=torch.uint8, out=out)


def _scratch_for(flat: Tensor, step: int) -> Tensor:
    """Room for one tile in whole bytes of signs, used for all tiles: fresh memory is slower than the arithmetic."""
    return torch.empty(-(-min(step, flat.numel()) // 8) * 8, dtype=flat.dtype, device=flat.device)


def _unpack(packed: Tensor, scratch: Tensor) -> Tensor:
    """The signs, +1 or -1, eight for each byte of ``packed``, at the start of ``scratch``."""
    signs = scratch[: 8 * packed.numel()]
    if packed.device.type == "cpu":
        # "clip" lets numpy write to ``out`` directly; a byte is never out of range.
        np.take(_SIGN_TABLES[signs.dtype], packed.numpy(), axis=0, out=signs.numpy().reshape(-1, 8), mode="clip")
    else:
        _unpack_by_torch(packed, signs)
    return signs


def _unpack_by_torch(packed: Tensor, signs: Tensor) -> None:
    table = _SIGN_TABLES[signs.dtype]
    torch.index_select(torch.from_numpy(table).to(packed.device), 0, packed.int(), out=signs.view(-1, 8))
