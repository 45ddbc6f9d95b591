"""Sums over all ranks that prove that all of them do the same."""

import contextlib
import io
import os
import signal
from typing import Any

import pytest
import torch.distributed as dist

from penstock._core.meter import CONTROL, Meter
from penstock._core.waiting import EXIT_DEADLINE, EXIT_PEER, Watcher
from penstock.pipe import PipeModelDataParallelTopology
from penstock.pipe.common_sum import CommonSums
from penstock.pipe.groups import PipeGroups
from support.pool import WorkerPool, run_fresh

Mesh = tuple[int, int, int]
"""Sizes of the pipe, model and data axes."""


def sums_of(mesh: Mesh, last: int, watcher: Watcher | None = None) -> CommonSums:
    watcher = watcher or Watcher(rank=dist.get_rank())
    groups = PipeGroups(PipeModelDataParallelTopology(*mesh), watcher=watcher)
    return CommonSums(groups, last, watcher=watcher, meter=Meter())


def add(rank: int, world_size: int, mesh: Mesh, last: int) -> list[list[float]]:
    """Three sums, each begun while other ranks may still be waiting for the one before."""
    sums = sums_of(mesh, last)
    return [
        sums.start(
            [10.0**-rank, float("nan") if rank == 0 and step else rank, 2.0**52], "test", step=step, training=True
        ).wait()
        for step in range(3)
    ]


@pytest.mark.parametrize(
    ("mesh", "last"), [((3, 1, 1), 2), ((3, 1, 1), 0), ((1, 1, 4), 0), ((1, 2, 2), 0), ((2, 1, 2), 1), ((2, 2, 1), 0)]
)
def test_every_rank_of_a_mesh_is_told_the_same_bits(pool: WorkerPool, mesh: Mesh, last: int) -> None:
    ranks = mesh[0] * mesh[1] * mesh[2]
    answers = pool.run(add, ranks, mesh, last)
    assert len({str(answer) for answer in answers}) == 1
    first, _, third = answers[0]
    assert first == [
        pytest.approx(sum(10.0**-rank for rank in range(ranks)), rel=1e-15),
        sum(range(ranks)),
        ranks * 2.0**52,
    ]
    assert third[0] == first[0]
    assert third[1] != third[1], "what is no number stays none"


def disagree(rank: int, world_size: int, mesh: Mesh, doing: dict[int, tuple[int, bool, int]]) -> str:
    """What the error says."""
    sums = sums_of(mesh, mesh[0] - 1)
    step, training, numbers = doing.get(rank, (7, True, 2))
    total = sums.start([0.0] * numbers, "test", step=step, training=training)
    try:
        return str(total.wait())
    except ValueError as error:
        return str(error)


USUAL = "training at step 7 (test: 2 numbers)"


@pytest.mark.parametrize(
    ("mesh", "odd", "does", "said", "other"),
    [
        ((2, 1, 1), 0, (7, False, 2), "evaluating at step 7 (test: 2 numbers)", 1),
        ((2, 1, 1), 0, (7, True, 1), "training at step 7 (test: 1 number)", 1),
        ((2, 1, 2), 1, (8, True, 2), "training at step 8 (test: 2 numbers)", 3),  # ranks 1 and 3 are a pipeline
        ((1, 1, 3), 2, (7, False, 2), "evaluating at step 7 (test: 2 numbers)", 0),
    ],
)
def test_a_rank_that_does_something_else_is_named_on_every_rank(
    pool: WorkerPool, mesh: Mesh, odd: int, does: tuple[int, bool, int], said: str, other: int
) -> None:
    ranks = mesh[0] * mesh[1] * mesh[2]
    problem = f"not all ranks do the same: rank {odd} is {said}, but rank {other} is {USUAL}; every rank must call "
    assert (
        pool.run(disagree, ranks, mesh, {odd: does})
        == [problem + "train_batch and eval_batch in the same order"] * ranks
    )


def count(rank: int, world_size: int) -> tuple[Any, float]:
    sums = sums_of((2, 1, 1), 1)
    early = sums.start([1.0], "test", step=0, training=True) if rank == 0 else None
    total = early or sums.start([1.0], "test", step=0, training=True)
    total.wait()
    meter = sums._along._meter
    return (meter.sent[CONTROL], meter.received[CONTROL]), meter.seconds["wait_loss"]


def test_bytes_and_waits_are_counted(pool: WorkerPool) -> None:
    (sent, received), (sent_there, received_there) = (counted for counted, _ in pool.run(count, 2))
    assert sent == received_there > 0
    assert sent_there == received > 0


def before_the_others(rank: int, world_size: int) -> bool:
    """Ranks of a pipeline learn the sum while the one with the last stage is still busy."""
    sums = sums_of((3, 1, 1), 2)
    store = dist.distributed_c10d._get_default_store()
    total = sums.start([1.0], "test", step=0, training=True)
    if rank == 2:
        store.wait(["0 knows", "1 knows"])
    known = total.wait() == [3.0]
    store.set(f"{rank} knows", "")
    return known


def test_who_is_done_does_not_wait_for_those_that_are_not(pool: WorkerPool) -> None:
    assert pool.run(before_the_others, 3) == [True] * 3


def killed(rank: int, world_size: int) -> None:
    with Watcher(rank=rank, deadline_s=20.0, store=dist.distributed_c10d._get_default_store()) as watcher:
        sums = sums_of((2, 1, 1), 1, watcher)
        sums.start([1.0], "test", step=0, training=True).wait()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sums.start([1.0], "next test", step=1, training=True).wait()


def test_a_rank_that_dies_is_named() -> None:
    _, left = run_fresh(killed, 2, deadline_s=30)
    assert left.code in (1, EXIT_PEER)
    assert "rank 1, next test, peer rank 0: failed: Connection closed by peer rank 0" in left.stderr


def late(rank: int, world_size: int) -> tuple[list[int], str]:
    """What the watcher of a rank does that waits for another longer than it may."""
    codes: list[int] = []
    written = io.StringIO()
    store = dist.distributed_c10d._get_default_store()

    def leave(code: int) -> None:
        codes.append(code)
        store.set("enough", "")

    with (
        contextlib.redirect_stderr(written),
        Watcher(rank=rank, deadline_s=0.5 if rank == 1 else 60.0, poll_s=0.05, leave=leave) as watcher,
    ):
        sums = sums_of((2, 1, 1), 1, watcher)
        sums.start([1.0], "test", step=0, training=True).wait()
        if rank == 0:
            store.wait(["enough"])
        sums.start([1.0], "next test", step=1, training=True).wait()
    return codes, written.getvalue()


def test_a_rank_that_is_late_is_named(pool: WorkerPool) -> None:
    (none, _), (codes, written) = pool.run(late, 2)
    assert (none, codes) == ([], [EXIT_DEADLINE])
    assert "rank 1, next test, peer rank 0: still waiting after 0." in written
