"""Interleaved 1F1B: several chunks per rank, and a bubble smaller by their number."""

import numpy as np

from penstock.pipe.schedule.actions import B_CODE, F_CODE
from penstock.pipe.schedule.periodic import Column, IntArray, periodic
from penstock.pipe.schedule.placement import loop
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def interleaved_1f1b(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """1F1B over chunks (Narayanan et al., "Efficient Large-Scale Training on GPU Clusters", SC 2021).

    Micro-batches go in groups of about ``p``: a group passes a rank's first chunk, then its second and so on, and
    back in reverse. With 2 ranks, 2 chunks and 2 micro-batches, one column per unit of time::

        rank 0 | 0F0 0F1 2F0 2F1     2B0     2B1 0B0 0B1
        rank 1 |     1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1

    Any number of micro-batches will do: they are cut into ``max(1, m // p)`` groups whose sizes differ by at most one,
    so that none is smaller than the pipeline is long, unless there are too few. Where ``p`` divides ``m`` the groups
    are the paper's.

    * Placement: a loop, stage ``s`` on rank ``s % p``, ``v`` chunks each.
    * Peak activations: ``min(2 (p - r - 1) + (v - 1) g + 1, v m)`` chunk activations on rank ``r``, with ``g`` the
      size of the largest group (``p`` where it divides ``m``).
    * Bubble: ``(p - 1) / (v m + p - 1)`` of the makespan where ``m >= p``, which is also the first rank's
      span.
    """
    check_sizes(ranks, micro_batches, chunks)
    groups = max(1, micro_batches // ranks)
    chunk, units = grouped(micro_batches, chunks, groups)
    largest = -(-micro_batches // groups)
    total = chunks * micro_batches
    lists = []
    for rank in range(ranks):
        ahead = min(2 * (ranks - rank - 1) + (chunks - 1) * largest, total)
        lists.append(
            periodic(
                [
                    Column(F_CODE, 0, chunk * ranks + rank, units),
                    Column(B_CODE, ahead, (chunks - 1 - chunk) * ranks + rank, units),
                ]
            )
        )
    return Schedule("interleaved_1f1b", ranks * chunks, micro_batches, tuple(lists), loop(ranks, chunks))


def grouped(micro_batches: int, chunks: int, groups: int) -> tuple[IntArray, IntArray]:
    """For each forward in turn, its chunk and micro-batch: group by group, within it chunk by chunk."""
    every = np.arange(micro_batches, dtype=np.int64)
    # The first (micro_batches % groups) groups are one larger.
    small, larger = divmod(micro_batches, groups)
    border = larger * (small + 1)
    group = np.where(every < border, every // (small + 1), larger + (every - border) // small)
    chunk = np.repeat(np.arange(chunks), micro_batches)
    order = np.argsort(np.tile(group, chunks) * chunks + chunk, kind="stable")
    return chunk[order].astype(np.int32), np.tile(every, chunks)[order].astype(np.int32)
