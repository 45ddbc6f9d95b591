"""Looped breadth-first: several chunks per rank, each run for all micro-batches before the next."""

import numpy as np

from penstock.pipe.schedule.actions import B_CODE, F_CODE
from penstock.pipe.schedule.periodic import Column, periodic
from penstock.pipe.schedule.placement import loop
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def looped_bfs(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """All micro-batches through one chunk, then through the next (Lamy-Poirier, "Breadth-First Pipeline", MLSys 2023).

    With 2 ranks, 2 chunks and 2 micro-batches, one column per unit of time::

        rank 0 | 0F0 0F1 2F0 2F1         2B0 2B1 0B0 0B1
        rank 1 |     1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1

    Backwards go through the chunks in reverse and through the micro-batches in ascending order. Each chunk's weights
    are used in one go forward and one backward, which suits sharded parameters.

    * Placement: a loop, stage ``s`` on rank ``s % p``, ``v`` chunks each.
    * Peak activations: all ``v m`` chunk activations on every rank.
    * Bubble: ``(p - 1) / (v m + p - 1)`` of the makespan where ``m >= p``, which is also the first rank's span.
    """
    check_sizes(ranks, micro_batches, chunks)
    total = chunks * micro_batches
    units = np.tile(np.arange(micro_batches, dtype=np.int32), chunks)
    chunk = np.repeat(np.arange(chunks, dtype=np.int32), micro_batches)
    lists = tuple(
        periodic(
            [
                Column(F_CODE, 0, chunk * ranks + rank, units),
                Column(B_CODE, total, chunk[::-1] * ranks + rank, units),
            ]
        )
        for rank in range(ranks)
    )
    return Schedule("looped_bfs", ranks * chunks, micro_batches, lists, loop(ranks, chunks))
