"""Forward only: evaluation and prediction."""

from penstock.pipe.schedule.action import FORWARD, Action
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def forward_only(num_stages: int, micro_batches: int) -> Schedule:
    """Every micro-batch forward through every stage, in order, and nothing backward.

    With 3 stages and 4 micro-batches, one column per unit of time::

        rank 0 | F0 F1 F2 F3
        rank 1 |    F0 F1 F2 F3
        rank 2 |       F0 F1 F2 F3
    """
    check_sizes(num_stages, micro_batches)
    ranks = tuple(tuple(Action(stage, FORWARD, i) for i in range(micro_batches)) for stage in range(num_stages))
    return Schedule("forward_only", num_stages, micro_batches, ranks, tuple(range(num_stages)), forward_only=True)
