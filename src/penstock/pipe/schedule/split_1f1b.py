"""What ZB-H1 and ZB-H2 share: 1F1B with weight gradients put off."""

import numpy as np

from penstock.pipe.schedule.actions import F_CODE, I_CODE, W_CODE
from penstock.pipe.schedule.periodic import Column, periodic
from penstock.pipe.schedule.placement import loop
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def split_1f1b(name: str, ranks: int, micro_batches: int, *, lead: int) -> Schedule:
    """Rows ``F I W`` where I lags F by ``lead`` for each following rank, and W lags on every rank as on the first.

    So every rank keeps at most ``lead * (ranks - 1) + 1`` micro-batches, and the later the rank, the more weight
    gradients it has at hand when the last input gradient is done.
    """
    check_sizes(ranks, micro_batches)
    every = np.arange(micro_batches, dtype=np.int32)

    def lag(following: int) -> int:
        return min(lead * following, micro_batches)

    lists = tuple(
        periodic(
            [
                Column(F_CODE, 0, rank, every),
                Column(I_CODE, lag(ranks - 1 - rank), rank, every),
                Column(W_CODE, lag(ranks - 1), rank, every),
            ]
        )
        for rank in range(ranks)
    )
    return Schedule(name, ranks, micro_batches, lists, loop(ranks))
