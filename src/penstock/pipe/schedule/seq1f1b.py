"""Seq1F1B: 1F1B over slices of the sequence."""

import numpy as np

from penstock.pipe.schedule.actions import B_CODE, F_CODE
from penstock.pipe.schedule.periodic import Column, periodic
from penstock.pipe.schedule.placement import loop
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def seq1f1b(ranks: int, micro_batches: int, slices: int = 2) -> Schedule:
    """1F1B whose unit is a slice of a micro-batch along the sequence, for causal models (Sun et al., "Seq1F1B", 2024).

    Unit ``micro_batch * slices + slice``. Slices of a micro-batch go forward in order, as later ones attend to the
    earlier, and backward in reverse order. With 2 ranks, 2 micro-batches and 2 slices, one column per unit of time::

        rank 0 | F0 F1 F2    B1 F3 B0    B3 B2
        rank 1 |    F0 F1 B1 F2 B0 F3 B3 B2

    The first backward waits for all slices of the first micro-batch, hence ``slices - 1`` more forwards ahead than
    1F1B's.

    * Placement: one stage per rank.
    * Peak activations: ``min(p - r + s - 1, m s)`` units of ``1/s`` micro-batch each on rank ``r`` with ``s`` slices.
    * Bubble: ``(p - 1) / (m s + p - 1)`` of the makespan where slices take equal time, which is also the first rank's
      span.
    """
    check_sizes(ranks, micro_batches, slices=slices)
    count = micro_batches * slices
    onward = np.arange(count, dtype=np.int32)
    back = np.ascontiguousarray(onward.reshape(micro_batches, slices)[:, ::-1]).reshape(-1)
    lists = tuple(
        periodic(
            [Column(F_CODE, 0, rank, onward), Column(B_CODE, min(ranks - 1 - rank + slices - 1, count), rank, back)]
        )
        for rank in range(ranks)
    )
    return Schedule("seq1f1b", ranks, micro_batches, lists, loop(ranks), slices=slices)
