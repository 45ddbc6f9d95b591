"""Cutting a flat tensor into blocks that share a scale, and those into tiles that stay in a cache."""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

_TILE_ELEMENTS: Final = 1 << 17
"""Elements handled at a time on the CPU: the several operations on a tile then cost about one pass over memory."""


_LANES: Final = 64


def as_flat(tensor: Tensor) -> Tensor:
    """Contiguous, one axis, float32 or float64."""
    flat = tensor.detach().reshape(-1).contiguous()  # what is strided or expanded may be a view until then
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
    """Sums of the rows of ``[rows, n]``: ``[rows, 1]``.

    Element ``j`` goes to lane ``j % 64``, each lane adds in order, then the second half of the lanes is added to the
    first until one is left: the same bits in any kernel, which no library's own summation promises.
    """
    rows, n = blocks.shape
    lanes = blocks.new_zeros(rows, _LANES)
    for first in range(0, n, _LANES):
        width = min(_LANES, n - first)
        lanes[:, :width] += blocks[:, first : first + width]
    count = _LANES
    while count > 1:
        count //= 2
        lanes = lanes[:, :count] + lanes[:, count:]
    return lanes
