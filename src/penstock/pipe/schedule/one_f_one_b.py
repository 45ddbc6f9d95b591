"""1F1B: alternate forwards and backwards as soon as the first backward can run."""

from collections.abc import Iterator

from penstock.pipe.schedule.action import BACKWARD, FORWARD, Action
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def one_f_one_b(num_stages: int, micro_batches: int) -> Schedule:
    """One forward, one backward (Narayanan et al., "PipeDream-Flush", ICML 2021).

    With 3 stages and 4 micro-batches, one column per unit of time::

        rank 0 | F0 F1 F2       B0 F3 B1    B2    B3
        rank 1 |    F0 F1    B0 F2 B1 F3 B2    B3
        rank 2 |       F0 B0 F1 B1 F2 B2 F3 B3

    The bubble is GPipe's, ``(p - 1) / (m + p - 1)`` of the makespan, but rank ``r`` keeps the activations of only
    ``min(p - r, m)`` micro-batches.
    """
    check_sizes(num_stages, micro_batches)
    ranks = tuple(tuple(_rank(stage, num_stages, micro_batches)) for stage in range(num_stages))
    return Schedule("1f1b", num_stages, micro_batches, ranks, tuple(range(num_stages)))


def _rank(stage: int, num_stages: int, micro_batches: int) -> Iterator[Action]:
    ahead = min(num_stages - stage - 1, micro_batches)
    for i in range(ahead):
        yield Action(stage, FORWARD, i)
    for i in range(micro_batches):
        if i + ahead < micro_batches:
            yield Action(stage, FORWARD, i + ahead)
        yield Action(stage, BACKWARD, i)
