import os
import time

import pytest
import torch
import torch.distributed as dist

from support.pool import WorkerError, WorkerPool, run_fresh


def add_up(rank: int, world_size: int, factor: int) -> float:
    x = torch.full((1,), float(rank * factor))
    dist.all_reduce(x)
    return x.item()


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def leave_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)


def sleep(rank: int, world_size: int) -> None:
    time.sleep(30)


def test_every_rank_answers(pool: WorkerPool) -> None:
    assert pool.run(add_up, 3, 10) == [30.0, 30.0, 30.0]
    assert pool.run(add_up, 2, 1) == [1.0, 1.0]


def test_a_childs_traceback_is_shown_and_the_pool_goes_on(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank one is unwell"):
        pool.run(raise_on_one, 2)
    assert pool.run(add_up, 2, 1) == [1.0, 1.0]


def test_a_hang_ends_at_the_deadline(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="no answer within 1 s"):
        pool.run(sleep, 2, deadline_s=1)


def test_fresh_processes_report_how_they_ended() -> None:
    ended = run_fresh(leave_on_one, 2)
    assert [e.code for e in ended] == [0, 3]


def test_a_fresh_process_can_be_killed() -> None:
    ended = run_fresh(sleep, 1, kill={0: 0.2})
    assert ended[0].code == -9
