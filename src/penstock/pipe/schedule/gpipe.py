"""GPipe: all forwards, then all backwards."""

import numpy as np

from penstock.pipe.schedule.actions import B_CODE, F_CODE
from penstock.pipe.schedule.periodic import Column, periodic
from penstock.pipe.schedule.placement import loop
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., "GPipe", NeurIPS 2019).

    With 3 ranks and 4 micro-batches, one column per unit of time::

        rank 0 | F0 F1 F2 F3             B0 B1 B2 B3
        rank 1 |    F0 F1 F2 F3       B0 B1 B2 B3
        rank 2 |       F0 F1 F2 F3 B0 B1 B2 B3

    Backwards run in ascending order too, so that gradients are summed in the same order as by 1F1B.

    * Placement: one stage per rank.
    * Peak activations: all ``m`` micro-batches on every rank.
    * Bubble: ``(p - 1) / (m + p - 1)`` of the makespan, which is also the first rank's span.
    """
    check_sizes(ranks, micro_batches)
    every = np.arange(micro_batches, dtype=np.int32)
    lists = tuple(
        periodic([Column(F_CODE, 0, rank, every), Column(B_CODE, micro_batches, rank, every)]) for rank in range(ranks)
    )
    return Schedule("gpipe", ranks, micro_batches, lists, loop(ranks))
