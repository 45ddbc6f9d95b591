"""Two bits an element."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from penstock.compression.algorithms._blocks import sum_rows
from penstock.compression.algorithms._integer import (
    SMALLEST_DIVISOR,
    StochasticQuantiser,
    pack_codes,
    unpack_codes,
)

_STEP: Final = 0.9957
"""Distance of the four equally spaced levels that suit a normal distribution of unit variance best.

Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory, 1960, table II.
"""


class Int2(StochasticQuantiser):
    """The levels -3, -1, 1 and 3 times a scale: a quarter of a byte an element and a float32 scale per block.

    Magnitudes above the step that suits a normal distribution count 3, others 1; the scale is then the one of least
    squared error. Rounding at random needs the outer levels at the block's largest magnitude instead.

    Args:
        block_size: Elements that share a scale, a multiple of 4.
        stochastic: Round at random, which is unbiased.
        seed: Of the random numbers.
    """

    name = "int2"
    bits = 2

    def __init__(self, *, block_size: int = 256, stochastic: bool = False, seed: int = 0) -> None:
        super().__init__(block_size=block_size, stochastic=stochastic, seed=seed)

    def contraction(self, shape: Sequence[int] | int) -> float | None:
        """``1 / (9 d)`` for blocks of ``d`` elements; about 0.88 for normal ones. None when rounding at random.

        With the scale of least error the loss is ``1 - <x, c>**2 / (|x|**2 |c|**2)``, where ``<x, c>`` is at least
        ``|x|_1`` and ``|c|**2`` at most ``9 d``.
        """
        return None if self.stochastic else (1 - 1e-5) / (9 * self._largest_block(shape))

    def _encode(self, blocks: Tensor, scales: Tensor, codes: Tensor, *, start: int) -> None:
        sizes = blocks.abs()
        if self.stochastic:
            largest = sizes.amax(dim=1, keepdim=True)
            scales.copy_(largest / 3)
            usable = torch.isfinite(largest) & (largest >= SMALLEST_DIVISOR)
            places = torch.where(usable, blocks * (1.5 / largest) + 1.5, 0.0)  # 0, 1, 2, 3 for the levels
            numbers = self._round(places, start=start).clamp_(0, 3) - 2
        else:
            count = blocks.shape[1]
            outer = sizes > _STEP * (sum_rows(sizes * sizes) / count).sqrt_()
            weights = torch.where(outer, 3.0, 1.0).to(sizes.dtype)
            scales.copy_(sum_rows(sizes.mul_(weights)) / sum_rows(weights * weights))
            # -2, -1, 0, 1 for the levels -3, -1, 1, 3; the sign is the float's own sign bit.
            numbers = torch.where(torch.signbit(blocks), -1.0 - outer.float(), outer.float())
        pack_codes(numbers, codes, bits=2)

    def _decode(self, scales: Tensor, codes: Tensor, out: Tensor) -> Tensor:
        return unpack_codes(codes, out, bits=2).mul_(2.0).add_(1.0).mul_(scales.to(out.dtype))
