"""Forward only: evaluation and prediction."""

from penstock.pipe.schedule.actions import F_CODE
from penstock.pipe.schedule.interleaved_1f1b import grouped
from penstock.pipe.schedule.periodic import Column, periodic
from penstock.pipe.schedule.placement import loop
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def forward_only(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Every micro-batch forward through every stage, in order, and nothing backward.

    With 3 ranks and 4 micro-batches, one column per unit of time::

        rank 0 | F0 F1 F2 F3
        rank 1 |    F0 F1 F2 F3
        rank 2 |       F0 F1 F2 F3

    With several chunks, micro-batches go through them in interleaved 1F1B's groups.

    * Placement: a loop, stage ``s`` on rank ``s % p``, ``v`` chunks each.
    * Peak activations: nothing is kept beyond the forward itself.
    * Bubble: none of any rank's span and ``(p - 1) / (v m + p - 1)`` of the makespan, with several chunks where
      ``m >= p``.
    """
    check_sizes(ranks, micro_batches, chunks)
    chunk, units = grouped(micro_batches, chunks, max(1, micro_batches // ranks))
    lists = tuple(periodic([Column(F_CODE, 0, chunk * ranks + rank, units)]) for rank in range(ranks))
    return Schedule("forward_only", ranks * chunks, micro_batches, lists, loop(ranks, chunks), forward_only=True)
