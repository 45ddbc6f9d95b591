"""1F1B: alternate forwards and backwards as soon as the first backward can run."""

import numpy as np

from penstock.pipe.schedule.actions import B_CODE, F_CODE
from penstock.pipe.schedule.periodic import Column, periodic
from penstock.pipe.schedule.placement import loop
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """One forward, one backward (Narayanan et al., "PipeDream-Flush", ICML 2021).

    With 3 ranks and 4 micro-batches, one column per unit of time::

        rank 0 | F0 F1 F2       B0 F3 B1    B2    B3
        rank 1 |    F0 F1    B0 F2 B1 F3 B2    B3
        rank 2 |       F0 B0 F1 B1 F2 B2 F3 B3

    * Placement: one stage per rank.
    * Peak activations: ``min(p - r, m)`` micro-batches on rank ``r``.
    * Bubble: GPipe's, ``(p - 1) / (m + p - 1)`` of the makespan, which is also the first rank's span.
    """
    check_sizes(ranks, micro_batches)
    every = np.arange(micro_batches, dtype=np.int32)
    lists = tuple(
        periodic([Column(F_CODE, 0, rank, every), Column(B_CODE, min(ranks - 1 - rank, micro_batches), rank, every)])
        for rank in range(ranks)
    )
    return Schedule("1f1b", ranks, micro_batches, lists, loop(ranks))
