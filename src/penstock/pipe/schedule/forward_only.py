"""Forward only: evaluation and prediction."""

from collections.abc import Sequence

from penstock.pipe.schedule.action import FORWARD, Action
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


def forward_on(placement: Sequence[int], micro_batches: int) -> Schedule:
    """Every micro-batch forward through stages that lie anywhere.

    Made by a clock whose unit is a forward pass: a rank that has inputs for several of its stages takes the last of
    these, so that what is on its way gets out before more comes in. No rank idles while the others fill up, whether
    the stages run in loops or go back along the ranks in a V.

    Args:
        placement: For each stage, its rank.
        micro_batches: How many.
    """
    check_sizes(len(placement), micro_batches)
    held = [[s for s, holder in enumerate(placement) if holder == rank] for rank in range(max(placement) + 1)]
    arrived = [micro_batches] + [0] * len(placement)
    done = [0] * len(placement)
    lists: list[list[Action]] = [[] for _ in held]
    while done[-1] < micro_batches:
        taken = []
        for rank, stages in enumerate(held):
            stage = next((s for s in reversed(stages) if done[s] < arrived[s]), None)
            if stage is not None:
                lists[rank].append(Action(stage, FORWARD, done[stage]))
                taken.append(stage)
        for stage in taken:
            done[stage] += 1
            arrived[stage + 1] += 1
    return Schedule.from_ranks(lists, "forward_only")
