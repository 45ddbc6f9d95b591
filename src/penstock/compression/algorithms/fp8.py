"""Eight-bit floats with a scale per block."""

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from penstock.compression.algorithms._integer import SMALLEST_DIVISOR
from penstock.compression.algorithms._quantiser import BlockQuantiser

_FORMATS: Final = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Fp8(BlockQuantiser):
    """Eight-bit floats times a scale that puts the block's largest magnitude at the end of their range.

    Micikevicius et al., "FP8 formats for deep learning", 2022 (arXiv:2209.05433). Against ``int8``: the error is in
    proportion to each element rather than to the largest.

    Args:
        format: ``"e4m3"`` (4 significant bits) or ``"e5m2"`` (3, with more range).
        block_size: Elements that share a scale.
    """

    name = "fp8"
    bits = 8

    def __init__(self, *, format: Literal["e4m3", "e5m2"] = "e4m3", block_size: int = 1024) -> None:
        super().__init__(block_size=block_size)
        if not isinstance(format, str) or format not in _FORMATS:
            raise ValueError(f"unknown format {format!r}; known: {', '.join(map(repr, _FORMATS))}")
        self.format: Literal["e4m3", "e5m2"] = format
        self._dtype = _FORMATS[format]
        self._range = torch.finfo(self._dtype)

    def contraction(self, shape: Sequence[int] | int) -> float:
        """An element loses at most half a unit in its last place: ``1 - eps**2 / 4 - d (tiny eps / 2)**2 / max**2``."""
        relative = self._range.eps / 2
        absolute = self._range.tiny * self._range.eps / 2 / self._range.max
        return 1 - relative**2 - self._largest_block(shape) * absolute**2 - 2e-6

    def _encode(self, blocks: Tensor, scales: Tensor, codes: Tensor, *, start: int) -> None:
        largest = blocks.abs().amax(dim=1, keepdim=True)
        scales.copy_(largest / self._range.max)
        usable = torch.isfinite(largest) & (largest >= SMALLEST_DIVISOR)
        scaled = torch.where(usable, blocks * (self._range.max / largest), 0.0)
        codes.copy_(scaled.float().to(self._dtype).view(torch.uint8))

    def _decode(self, scales: Tensor, codes: Tensor, out: Tensor) -> Tensor:
        return out.copy_(codes.view(self._dtype)).mul_(scales.to(out.dtype))
