"""Cutting a flat tensor into blocks that share a scale, and those into tiles that stay in a cache."""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

_TILE_ELEMENTS: Final = 1 << 17
"""Elements handled at a time on the CPU: the several operations on a tile then cost about one pass over memory."""


def as_flat(tensor: Tensor) -> Tensor:
    """Contiguous, one axis, float32 or float64."""
    flat = tensor.detach().reshape(-1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()


def tiles(numel: int, block: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """Cut ``range(numel)`` into ``(start, rows, length)``: ``rows`` blocks of ``length`` elements from ``start`` on.

    All but the last tile have ``length == block``; a rest shorter than a block is a tile of one row. Devices other
    than the CPU take all whole blocks at once.
    """
    step = max(1, _TILE_ELEMENTS // block) * block if device.type == "cpu" else max(numel, 1)
    whole = numel // block * block
    for start in range(0, whole, step):
        yield start, (min(start + step, whole) - start) // block, block
    if whole < numel:
        yield whole, 1, numel - whole


def sum_rows(blocks: Tensor) -> Tensor:
    """Sums of the rows of ``[rows, n]``, overwriting it: ``[rows, 1]``.

    The second half is added to the first until one column is left: the same bits on any device and in any kernel,
    which no library's own summation promises.
    """
    n = blocks.shape[1]
    while n > 1:
        half = (n + 1) // 2
        blocks[:, : n - half] += blocks[:, half:n]
        n = half
    return blocks[:, :1]
