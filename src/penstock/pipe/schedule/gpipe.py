"""GPipe: all forwards, then all backwards."""

from penstock.pipe.schedule.action import BACKWARD, FORWARD, Action
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def gpipe(num_stages: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., "GPipe", NeurIPS 2019).

    With 3 stages and 4 micro-batches, one column per unit of time::

        rank 0 | F0 F1 F2 F3             B0 B1 B2 B3
        rank 1 |    F0 F1 F2 F3       B0 B1 B2 B3
        rank 2 |       F0 F1 F2 F3 B0 B1 B2 B3

    Backwards run in ascending order too, so that gradients are summed in the same order as by 1F1B. Every rank keeps
    the activations of all ``micro_batches``; the bubble is ``(p - 1) / (m + p - 1)`` of the makespan.
    """
    check_sizes(num_stages, micro_batches)
    ranks = tuple(
        tuple(Action(stage, op, i) for op in (FORWARD, BACKWARD) for i in range(micro_batches))
        for stage in range(num_stages)
    )
    return Schedule("gpipe", num_stages, micro_batches, ranks, tuple(range(num_stages)))
