"""Several engines in one life of the processes: none may be disturbed by what the ones before it left."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import penstock
from penstock.pipe.topology import ProcessTopology
from penstock.runtime.engine import NotFiniteError
from support.pool import WorkerPool, run_fresh
from support.run_jobs import config, model, tokens, train


def nothing_left_job(rank: int, world_size: int) -> list[tuple[int, int]]:
    left = []
    for _ in range(4):
        with penstock.initialize(model(), config(stages=2, steps=20), training_data=tokens()) as engine:
            engine.train_batch()
        left.append((len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))))
    return left


def test_process_groups_are_closed(pool: WorkerPool) -> None:
    for left in pool.run(nothing_left_job, 2):
        files, threads = zip(*left, strict=True)
        # An engine's groups are dozens of files and threads; the pool's own may come and go by one.
        assert files[-1] <= files[0] + 3
        assert threads[-1] <= threads[0] + 3


def hooks_job(rank: int, world_size: int) -> int:
    net = nn.Linear(4, 2)
    rows = [(torch.randn(4), torch.randn(2)) for _ in range(8)]
    settings = {"train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 4}}
    for _ in range(2):
        with penstock.initialize(net, settings, training_data=rows, loss_fn=nn.functional.mse_loss) as engine:
            engine.train_batch()
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in net.parameters())


def test_a_model_trained_in_place_keeps_no_hooks(pool: WorkerPool) -> None:
    """A hook would keep the reducer's buffers alive: as much memory as the model, for each engine."""
    assert pool.run(hooks_job, 2) == [0, 0]


def after_a_fault_job(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    settings = config(stages=2, steps=20)
    with penstock.initialize(model(), settings, training_data=tokens()) as engine:
        before = [engine.train_batch()]
        if rank == world_size - 1:
            engine.parts.pipeline.passes.loss_fn = lambda output, targets: output.sum() * float("nan")
        try:
            engine.train_batch()
        except NotFiniteError:
            before.append(float("inf"))
    with penstock.initialize(model(), settings, training_data=tokens()) as engine:
        after = [engine.train_batch()]
        time.sleep(3.0)  # a watcher gives the main thread two seconds before it ends the process
        return before, [*after, engine.train_batch()]


def test_a_fault_that_all_ranks_got_over_does_not_end_the_next_engine(pool: WorkerPool) -> None:
    expected = train(config(steps=20), 2)[0]
    for before, after in pool.run(after_a_fault_job, 2):
        assert before[1] == float("inf")
        assert all(abs(a - b) < 1e-12 for a, b in zip(after, expected, strict=True))


def launched_job(rank: int, world_size: int) -> None:
    for _ in range(3):
        with penstock.initialize(model(), config(stages=2, steps=20, deadline_s=20), training_data=tokens()) as engine:
            print(engine.train_batch().hex())


def test_launched_processes_may_make_engines_one_after_the_other() -> None:
    """The launcher's store outlives each engine's process group, and with it the addresses left there."""
    for end in run_fresh(launched_job, 2, launched=True):
        assert end.code == 0, end.stderr
        losses = end.stdout.split()
        assert len(losses) == 3
        assert len(set(losses)) == 1


def turned_job(rank: int, world_size: int) -> tuple[int, Any]:
    module = model()
    module = type(module)(
        module.specs, topology=ProcessTopology(["data", "pipe"], [2, 2]), loss_fn=module.loss_fn, base_seed=1234
    )
    with penstock.initialize(module, config(stages=2, replicas=2, steps=20), training_data=tokens()) as engine:
        return engine.stage.index, [engine.train_batch() for _ in range(2)]


def test_a_models_topology_places_the_ranks(pool: WorkerPool) -> None:
    expected = train(config(steps=20), 2)[0]
    ranks = pool.run(turned_job, 4)
    assert [stage for stage, _ in ranks] == [0, 1, 0, 1]
    for _, losses in ranks:
        assert all(abs(a - b) < 1e-12 for a, b in zip(losses, expected, strict=True))
