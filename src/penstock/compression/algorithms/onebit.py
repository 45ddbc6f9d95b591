"""One sign bit an element and one scale a block.

Seide et al., "1-bit stochastic gradient descent and its application to data-parallel distributed training of speech
DNNs", Interspeech 2014; with the mean absolute value as scale it is the scaled sign of Karimireddy et al., "Error
feedback fixes SignSGD and other gradient compression schemes", ICML 2019. For a block ``x`` of ``d`` elements the
scale ``|x|_1 / d`` minimises ``|x - s sign(x)|_2``, and what is left over is ``1 - |x|_1**2 / (d |x|_2**2)`` of the
block's energy: a contraction whatever the block. DeepSpeed's scale, ``|x|_2 / sqrt(d)``, keeps the energy instead.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.compression.algorithms._blocks import sum_rows
from penstock.compression.algorithms._quantiser import BlockQuantiser
from penstock.compression.kernels import BlockKernels, kernels_for

_BYTE_SIGNS: Final = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(
    np.int8
)
"""The eight signs (+1 or -1) that each byte stands for, ``[256, 8]``."""

_SIGN_TABLES: Final[dict[torch.dtype, npt.NDArray[Any]]] = {
    torch.float32: _BYTE_SIGNS.astype(np.float32),
    torch.float64: _BYTE_SIGNS.astype(np.float64),
}


class OneBit(BlockQuantiser):
    """Sign bits with one float32 scale per block of consecutive elements.

    The sign is the float's own sign bit: ``+0.0`` counts as positive, ``-0.0`` as negative. Bit ``i`` of byte ``j`` is
    the sign of element ``8 j + i``, set when negative.

    Args:
        block_size: Elements that share a scale, a multiple of 8. At 1024 the wire is 1/31 of float32's.
        scale: ``"l1"``, the mean absolute value, has the least error; ``"rms"`` is DeepSpeed's.
    """

    name = "onebit"
    bits = 1

    def __init__(self, *, block_size: int = 1024, scale: Literal["l1", "rms"] = "l1") -> None:
        super().__init__(block_size=block_size)
        if scale not in ("l1", "rms"):
            raise ValueError(f"unknown scale {scale!r}; known: 'l1' (mean absolute value), 'rms' (root mean square)")
        self.scale: Literal["l1", "rms"] = scale

    def contraction(self, shape: Sequence[int] | int) -> float | None:
        """``1 / d`` for blocks of ``d`` elements, because ``|x|_1 >= |x|_2``; about 0.64 for normal ones.

        None for ``"rms"``, which may make a lopsided block worse than sending nothing.
        """
        return (1 - 1e-5) / self._largest_block(shape) if self.scale == "l1" else None

    def _kernels(self, *tensors: Tensor) -> BlockKernels | None:
        name = "onebit" if self.scale == "l1" else "onebit_rms"
        return kernels_for(name, None, *tensors, block_size=self.block_size)

    def _encode(self, blocks: Tensor, scales: Tensor, codes: Tensor, *, start: int) -> None:
        count = blocks.shape[1]
        if self.scale == "l1":
            scales.copy_(sum_rows(blocks.abs()) / count)
        else:
            # In float64: torch's root of a float32 is not always the nearest one.
            scales.copy_((sum_rows(blocks * blocks) / count).double().sqrt_())
        (_pack if blocks.device.type == "cpu" else _pack_by_torch)(blocks, codes)

    def _decode(self, scales: Tensor, codes: Tensor, out: Tensor) -> Tensor:
        rows, width = codes.shape
        signs = out if out.shape[1] == 8 * width else torch.empty(rows, 8 * width, dtype=out.dtype, device=out.device)
        (_unpack if out.device.type == "cpu" else _unpack_by_torch)(codes, signs)
        return torch.mul(signs[:, : out.shape[1]], scales.to(out.dtype), out=out)


def _pack(blocks: Tensor, out: Tensor) -> None:
    """Sign bits of ``[rows, n]`` into uint8 ``[rows, ceil(n / 8)]``, the last byte of a row filled with zeros."""
    out.copy_(torch.from_numpy(np.packbits(np.signbit(blocks.numpy()), axis=1, bitorder="little")))


def _pack_by_torch(blocks: Tensor, out: Tensor) -> None:
    bits = torch.nn.functional.pad(torch.signbit(blocks).to(torch.uint8), (0, -blocks.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    torch.sum(bits.view(*out.shape, 8) << places, dim=2, dtype=torch.uint8, out=out)


def _unpack(codes: Tensor, out: Tensor) -> None:
    """The signs, +1 or -1, eight for each byte of ``[rows, width]``, into ``[rows, 8 width]``."""
    # "clip" lets numpy write to ``out`` directly; a byte is never out of range.
    np.take(_SIGN_TABLES[out.dtype], codes.numpy(), axis=0, out=out.numpy().reshape(*codes.shape, 8), mode="clip")


def _unpack_by_torch(codes: Tensor, out: Tensor) -> None:
    table = torch.from_numpy(_SIGN_TABLES[out.dtype]).to(codes.device)
    torch.index_select(table, 0, codes.int().view(-1), out=out.view(-1, 8))
