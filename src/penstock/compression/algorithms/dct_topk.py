"""The largest coefficients of a cosine transform."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField
from penstock.compression.algorithms._sparse import pack_places, places_field, unpack_places


class DctTopK(CompressionAlgorithm):
    """Tiles of a matrix, transformed by an orthonormal discrete cosine transform; of each the largest coefficients.

    Peng, Quesnelle, Kingma, "Decoupled momentum optimization", 2024 (arXiv:2411.19870), section 3. Vectors are cut
    into tiles of one row; tensors of more than two axes count as matrices ``[shape[0], rest]``. An axis longer than a
    tile is cut into equal parts, filled up with zeros where it does not divide.

    Args:
        chunk: Largest side of a tile, at most 256.
        topk: Coefficients sent of each tile.
    """

    name = "dct_topk"
    sparse = True
    shaped = True

    def __init__(self, *, chunk: int = 64, topk: int = 32) -> None:
        for option, value, most in (("chunk", chunk, 256), ("topk", topk, chunk * chunk)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"{option} must be a whole number from 1 to {most}, got {value!r}")
        self.chunk = chunk
        self.topk = topk

    def payload_layout(self, numel: int) -> list[PayloadField]:
        """For a vector; see :meth:`layout_for`."""
        return self.layout_for((numel,))

    def layout_for(self, shape: Sequence[int]) -> list[PayloadField]:
        """``values`` float32 ``[tiles * kept]`` and ``places``, uint8."""
        grid = _grid(tuple(shape), self.chunk)
        count = grid.tiles * self._kept(grid)
        return [PayloadField("values", torch.float32, (count,)), places_field(count, grid.size)]

    def contraction(self, shape: Sequence[int] | int) -> float:
        """Coefficients kept over those of a tile: the transform keeps the energy, the largest have their share."""
        grid = _grid((shape,) if isinstance(shape, int) else tuple(shape), self.chunk)
        return (self._kept(grid) / grid.size) * (1 - 1e-5) if grid.tiles else 1.0

    def compress(self, tensor: Tensor) -> Payload:
        """Transform and choose."""
        grid = _grid(tuple(tensor.shape), self.chunk)
        dtype = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
        kept = self._kept(grid)
        if not grid.tiles:
            places = torch.empty(0, dtype=torch.int64, device=tensor.device)
            return {"values": places.float(), "places": pack_places(places, grid.size)}
        matrix = tensor.detach().reshape(grid.rows, grid.columns).to(dtype)
        padding = (0, grid.across * grid.width - grid.columns, 0, grid.down * grid.height - grid.rows)
        tiles = torch.nn.functional.pad(matrix, padding).view(grid.down, grid.height, grid.across, grid.width)
        coefficients = _basis(grid.height, tiles) @ tiles.transpose(1, 2) @ _basis(grid.width, tiles).T
        flat = coefficients.reshape(grid.tiles, grid.size)
        chosen = torch.topk(flat.abs(), kept, dim=1, sorted=False).indices
        return {
            "values": flat.gather(1, chosen).float().view(-1),
            "places": pack_places(chosen.view(-1), grid.size),
        }

    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """Transform back."""
        grid = _grid(tuple(out.shape), self.chunk)
        if not grid.tiles:
            return out
        dtype = out.dtype if out.dtype == torch.float64 else torch.float32
        kept = self._kept(grid)
        places = unpack_places(payload["places"], grid.tiles * kept, grid.size).view(grid.tiles, kept)
        flat = torch.zeros(grid.tiles, grid.size, dtype=dtype, device=out.device)
        flat.scatter_(1, places, payload["values"].to(dtype).view(grid.tiles, kept))
        coefficients = flat.view(grid.down, grid.across, grid.height, grid.width)
        tiles = _basis(grid.height, flat).T @ coefficients @ _basis(grid.width, flat)
        matrix = tiles.transpose(1, 2).reshape(grid.down * grid.height, grid.across * grid.width)
        return out.copy_(matrix[: grid.rows, : grid.columns].reshape(out.shape))

    def _kept(self, grid: "_Grid") -> int:
        return min(self.topk, grid.size)


class _Grid(NamedTuple):
    """How a matrix is cut into ``down * across`` tiles of ``height`` by ``width``."""

    rows: int
    columns: int
    down: int
    across: int
    height: int
    width: int

    @property
    def tiles(self) -> int:
        return self.down * self.across

    @property
    def size(self) -> int:
        return self.height * self.width


@lru_cache(maxsize=4096)
def _grid(shape: tuple[int, ...], chunk: int) -> _Grid:
    rows, columns = (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
    if rows * columns == 0:
        return _Grid(rows, columns, 0, 0, 1, 1)
    down, across = -(-rows // chunk), -(-columns // chunk)
    return _Grid(rows, columns, down, across, -(-rows // down), -(-columns // across))


def _basis(size: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II as a matrix ``[size, size]``; a row for each frequency."""
    return _basis_of(size, like.dtype, like.device)


@lru_cache(maxsize=64)
def _basis_of(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    place = torch.arange(size, dtype=torch.float64) + 0.5
    basis = torch.cos(math.pi / size * frequency * place) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.to(device=device, dtype=dtype)
