"""Which forward passes of a step may run before the step before it has been validated."""

from itertools import takewhile

from penstock.pipe.schedule.action import FORWARD
from penstock.pipe.schedule.schedule import Schedule


def head_start(schedule: Schedule) -> frozenset[tuple[int, int]]:
    """The forward passes with which ranks may begin while the last rank still finishes the step before.

    A triangle: with ``p`` ranks, stage ``s`` has at most ``p - 1 - s`` of them, for what micro-batch ``i`` gives the
    last rank there only comes after it has finished. It holds what comes first on each rank, and no pass without the
    one of the stage before::

        stage 0   F0 F1 F2
        stage 1      F0 F1
        stage 2         F0
        stage 3             (validated)

    Returns:
        Pairs ``(stage, micro_batch)``.
    """
    last = schedule.num_ranks - 2
    firsts = [
        [
            (action.stage, action.micro_batch)
            for action in takewhile(
                lambda action: action.op == FORWARD and action.stage + action.micro_batch <= last, actions
            )
        ]
        for actions in schedule.ranks
    ]
    while True:
        allowed = {forward for forwards in firsts for forward in forwards}
        kept = [
            list(takewhile(lambda f: f[0] == 0 or (f[0] - 1, f[1]) in allowed, forwards))  # noqa: B023, called at once
            for forwards in firsts
        ]
        if kept == firsts:
            return frozenset(allowed)
        firsts = kept
