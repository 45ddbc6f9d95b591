"""How a flat buffer is cut so that each rank reduces one part of it, and where the parameters lie in it."""

from typing import Final, NamedTuple

from torch import Tensor

CHUNK_ALIGNMENT: Final = 64
"""Elements; a chunk starts on a whole byte of sign bits and on a cache line."""


class Part(NamedTuple):
    """Where one tensor lies in a flat buffer.

    Attributes:
        start: Its first element.
        shape: Its shape.
    """

    start: int
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The view of ``flat`` in this tensor's shape."""
        numel = 1
        for size in self.shape:
            numel *= size
        return flat[self.start : self.start + numel].view(self.shape)


def chunk_bounds(numel: int, ranks: int) -> list[tuple[int, int]]:
    """Half-open ranges of ``range(numel)``, one a rank, equal but for the last ones (which may be short or empty)."""
    size = -(-numel // ranks)
    size = -(-size // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
    return [(min(rank * size, numel), min((rank + 1) * size, numel)) for rank in range(ranks)]
