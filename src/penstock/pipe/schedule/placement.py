"""Which rank holds which stages."""

from collections.abc import Callable
from typing import Final

from penstock._core.suggest import unknown_name
from penstock.pipe.schedule.schedule import check_sizes

Placement = tuple[int, ...]
"""For each stage, in model order, the pipeline rank that holds it."""


def loop(ranks: int, chunks: int = 1) -> Placement:
    """Stage ``s`` on rank ``s % ranks``: the model goes round the ranks once for each chunk.

    With one chunk this is the plain pipeline, stage ``r`` on rank ``r``.
    """
    check_sizes(ranks, 1, chunks)
    return tuple(range(ranks)) * chunks


def v_shape(ranks: int, chunks: int = 2) -> Placement:
    """Down the ranks and back up, and so on for more than two chunks: neighbouring chunks meet on one rank.

    With two chunks (a V) rank 0 holds the first and the last stage (Qi et al., "Pipeline Parallelism with Controllable
    Memory", NeurIPS 2024). More chunks make a wave (Liu et al., "Hanayo", SC 2023).
    """
    check_sizes(ranks, 1, chunks)
    down = tuple(range(ranks))
    return tuple(rank for chunk in range(chunks) for rank in (down if chunk % 2 == 0 else down[::-1]))


PLACEMENTS: Final[dict[str, Callable[[int, int], Placement]]] = {"loop": loop, "v": v_shape}
"""For each name, a function ``(ranks, chunks) -> placement``."""


def get_placement(name: str, ranks: int, chunks: int) -> Placement:
    """The placement called ``name``.

    Raises:
        ValueError: An unknown name, or fewer than one rank or chunk.
    """
    if name not in PLACEMENTS:
        raise ValueError(unknown_name("placement", name, PLACEMENTS))
    return PLACEMENTS[name](ranks, chunks)
