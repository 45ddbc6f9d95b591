"""Rounding to a few equally spaced levels, to the nearest or at random."""

from collections.abc import Sequence
from typing import ClassVar, Final, Self

import numpy as np
import torch
from torch import Tensor

from penstock._core.keys import derive, random_words
from penstock.compression.algorithms._quantiser import BlockQuantiser
from penstock.compression.kernels import BlockKernels, kernels_for

SMALLEST_DIVISOR: Final = 2.0**-100
"""A block whose largest magnitude is below counts as zeros: the reciprocal of its scale would overflow."""


class StochasticQuantiser(BlockQuantiser):
    """A block quantiser that can round at random, so that the result is right on average.

    Dan Alistarh et al., "QSGD: communication-efficient SGD via gradient quantization and encoding", NeurIPS 2017, with
    the largest magnitude of a block in place of its 2-norm. An element between two levels takes the upper one with
    the probability that makes its mean exact (up to float32's rounding). The random numbers are a function of a key and
    the element's place: nothing has to be saved, and :meth:`keyed` gives other ones.

    Args:
        block_size: Elements that share a scale; a multiple of ``8 / bits``.
        stochastic: Round at random: unbiased, with more error. Otherwise to the nearest level.
        seed: Of the random numbers.
    """

    def __init__(self, *, block_size: int, stochastic: bool = False, seed: int = 0) -> None:
        super().__init__(block_size=block_size)
        if not isinstance(stochastic, bool):
            raise ValueError(f"stochastic must be true or false, got {stochastic!r}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        self.stochastic = stochastic
        self.seed = seed
        self._key = derive("rounding", seed)

    @property
    def random(self) -> bool:
        """With ``stochastic``."""
        return self.stochastic

    @property
    def unbiased(self) -> bool:
        """With ``stochastic``."""
        return self.stochastic

    def keyed(self, *parts: int | str) -> Self:
        """The same with other random numbers."""
        if not self.stochastic:
            return self
        other = type(self)(**self.options())
        other._key = derive("rounding", self.seed, *parts)
        return other

    def _kernels(self, *tensors: Tensor) -> BlockKernels | None:
        key = self._key if self.stochastic else None
        return kernels_for(self.name, key, *tensors, block_size=self.block_size)

    def _round(self, levels: Tensor, *, start: int) -> Tensor:
        """Whole numbers from ``levels``, overwriting it."""
        if not self.stochastic:
            return levels.round_()
        return levels.add_(_uniform(self._key, start, levels)).floor_()


class Integer(StochasticQuantiser):
    """Whole multiples of a scale, which is the block's largest magnitude over :attr:`top`."""

    top: ClassVar[int]

    def contraction(self, shape: Sequence[int] | int) -> float | None:
        """``4 top**2 / (4 top**2 + d - 1)`` for blocks of ``d`` elements: the largest is exact, the others lose at most
        half a step and no more than themselves. None when rounding at random.
        """
        if self.stochastic:
            return None
        steps = 4 * self.top**2
        return steps / (steps + self._largest_block(shape) - 1) - 2e-6  # float32's rounding of scales and products

    def _encode(self, blocks: Tensor, scales: Tensor, codes: Tensor, *, start: int) -> None:
        largest = blocks.abs().amax(dim=1, keepdim=True)
        scales.copy_(largest / self.top)
        usable = torch.isfinite(largest) & (largest >= SMALLEST_DIVISOR)
        levels = self._round(torch.where(usable, blocks * (self.top / largest), 0.0), start=start)
        pack_codes(levels.clamp_(-self.top, self.top), codes, bits=self.bits)

    def _decode(self, scales: Tensor, codes: Tensor, out: Tensor) -> Tensor:
        return unpack_codes(codes, out, bits=self.bits).mul_(scales.to(out.dtype))


def pack_codes(levels: Tensor, out: Tensor, *, bits: int) -> None:
    """Whole numbers ``[rows, n]`` in two's complement, ``8 / bits`` to a byte.

    A row is cut into ``8 / bits`` equal parts (the last filled up with zeros): byte ``j`` holds the ``j``-th number of
    each part, the first part's in its lowest bits.
    """
    if bits == 8:
        out.view(torch.int8).copy_(levels)
        return
    parts, width = 8 // bits, out.shape[1]
    numbers = levels.to(torch.int8).bitwise_and_((1 << bits) - 1).view(torch.uint8)
    if numbers.shape[1] < parts * width:
        numbers = torch.nn.functional.pad(numbers, (0, parts * width - numbers.shape[1]))
    out.copy_(numbers[:, :width])
    for part in range(1, parts):
        out.bitwise_or_(numbers[:, part * width : (part + 1) * width] << (bits * part))


def unpack_codes(codes: Tensor, out: Tensor, *, bits: int) -> Tensor:
    """Fill ``out`` ``[rows, n]`` with the numbers that :func:`pack_codes` packed, and return it."""
    if bits == 8:
        return out.copy_(codes.view(torch.int8))
    n, width = out.shape[1], codes.shape[1]
    for part in range(8 // bits):
        target = out[:, part * width : min(n, (part + 1) * width)]
        # Up to the top of the byte and down again, as a signed number: this brings the sign along.
        raised = (codes << (8 - bits * (part + 1))).view(torch.int8) >> (8 - bits)
        target.copy_(raised[:, : target.shape[1]])
    return out


def _uniform(key: int, start: int, like: Tensor) -> Tensor:
    """Multiples of ``2**-24`` in ``[0, 1)``; on the CPU element ``i`` is a function of ``(key, start + i)`` alone."""
    if like.device.type == "cpu":
        words = random_words(key, np.arange(start, start + like.numel(), dtype=np.uint64))
        numbers = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return torch.from_numpy(numbers).view(like.shape).to(like.dtype)
    generator = torch.Generator(device=like.device)
    generator.manual_seed(derive(key, start) & ((1 << 63) - 1))
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)
