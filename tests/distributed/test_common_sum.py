"""Sums over all ranks that prove that all of them do the same."""

import pytest
import torch.distributed as dist

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.pipe.common_sum import CommonSum
from support.pool import WorkerPool


def add(rank: int, world_size: int, doing: list[tuple[int, bool]]) -> list[float] | str:
    """The sums, or what the error says."""
    step, training = doing[rank]
    numbers = [rank + 1.0, 0.25]
    total = CommonSum(
        numbers, "test", step=step, training=training, group=dist.group.WORLD, watcher=Watcher(), meter=Meter()
    )
    try:
        return total.wait()
    except ValueError as error:
        return str(error).partition("; ")[0]


def test_numbers_are_added_up(pool: WorkerPool) -> None:
    assert pool.run(add, 3, [(7, True)] * 3) == [[6.0, 0.75]] * 3


@pytest.mark.parametrize(
    ("doing", "named"),
    [
        ([(7, True), (7, False)], ["training at step 7", "evaluating at step 7"]),
        ([(7, True), (8, True)], ["training at step 7", "training at step 8"]),
        ([(0, False), (1, False)], ["evaluating at step 0", "evaluating at step 1"]),
    ],
)
def test_ranks_that_do_different_things_are_all_told(
    pool: WorkerPool, doing: list[tuple[int, bool]], named: list[str]
) -> None:
    assert pool.run(add, 2, doing) == [f"this rank is {what}, but not all ranks are" for what in named]


def test_more_numbers_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="got 5 numbers to add up over all ranks; at most 4"):
        CommonSum([0.0] * 5, "test", step=0, training=True, group=None, watcher=Watcher(), meter=Meter())
