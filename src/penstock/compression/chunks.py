"""How a flat buffer is cut so that each rank reduces one part of it."""

from typing import Final

CHUNK_ALIGNMENT: Final = 64
"""Elements; a chunk starts on a whole byte of sign bits and on a cache line."""


def chunk_bounds(numel: int, ranks: int) -> list[tuple[int, int]]:
    """Half-open ranges of ``range(numel)``, one a rank, equal but for the last ones (which may be short or empty)."""
    size = -(-numel // ranks)
    size = -(-size // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
    return [(min(rank * size, numel), min((rank + 1) * size, numel)) for rank in range(ranks)]
