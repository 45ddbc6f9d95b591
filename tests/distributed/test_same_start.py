"""Replicas that start from different weights are found out, or made equal where an engine may."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import penstock
from penstock.compression import OneBitAdam, Reducer
from support.pool import WorkerPool


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[2].weight = nn.Parameter(torch.randn(8, 3).t())  # not contiguous
    return model


def alone_job(rank: int, world_size: int, kind: str, seeds: list[int]) -> str:
    model = net(seeds[rank])
    model(torch.ones(2, 4)).sum().backward()
    try:
        if kind == "reducer":
            Reducer([list(model.named_parameters())]).begin_step(lambda: 1.0)
        else:
            OneBitAdam(model.parameters(), lr=0.1, freeze_step=2).step()
    except ValueError as error:
        return str(error)
    return "started"


def test_without_an_engine_different_weights_are_refused_on_every_replica(pool: WorkerPool) -> None:
    for kind in ("reducer", "optimizer"):
        assert pool.run(alone_job, 2, kind, [5, 5]) == ["started", "started"]
        for said in pool.run(alone_job, 2, kind, [5, 6]):
            assert "the replicas start from different weights" in said


def engine_job(rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    model = net(rank)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    config = {"train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 3}, "deadline_s": 30}
    with penstock.initialize(model, config, loss_fn=F.mse_loss) as engine:
        started = {name: value.clone() for name, value in model.state_dict().items()}
        engine.train_batch(iter([(torch.randn(2, 4), torch.randn(2, 3))]))
        return (first if rank == 0 else started), dict(model.named_parameters())


def test_an_engine_gives_all_replicas_the_first_ones_weights(pool: WorkerPool) -> None:
    (expected, trained), (started, trained2) = pool.run(engine_job, 2)
    assert all(torch.equal(started[name], expected[name]) for name in expected)
    assert all(torch.equal(trained[name], trained2[name]) for name in trained)
