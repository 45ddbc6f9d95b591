"""The engine computes what one process does: losses and gradients, for every layout and schedule."""

import random

import pytest
import torch
from torch import Tensor

from penstock._core.batch_key import BatchKey, entered
from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.pipe import PipeDataParallelTopology
from penstock.pipe.engine import PipelineEngine
from penstock.pipe.groups import PipeGroups, tied_ranks
from penstock.pipe.schedule import Schedule
from support.pipe_exchange import PlainExchange
from support.pipe_models import batch, cross_entropy, language_model
from support.pipe_schedules import v_shaped
from support.pool import WorkerPool

SEED = 5
STEPS = 3
GLOBAL_MICRO_BATCHES = 8
LEARNING_RATE = 0.1

Run = tuple[list[float], dict[str, Tensor]]
"""Losses of all steps and the gradients of the last one by canonical name."""


def reference(dropout: float = 0.3) -> Run:
    """One process, a plain loop over layers, no engine."""
    torch.set_default_dtype(torch.float64)
    try:
        stage = language_model(1, dropout=dropout).build_stage(0)
        losses = []
        for step in range(STEPS):
            stage.zero_grad()
            total = 0.0
            for index in range(GLOBAL_MICRO_BATCHES):
                micro_batch = batch(step, index)
                key = BatchKey(SEED, step, index, micro_batch.positions)
                value = micro_batch.inputs
                with entered(key):
                    for name, layer in stage.layers.items():
                        key.seed_layer(int(name))
                        value = layer(value)
                loss = cross_entropy(value, micro_batch.targets) / GLOBAL_MICRO_BATCHES
                loss.backward()
                total += loss.item()
            losses.append(total)
            with torch.no_grad():
                for parameter in stage.parameters():
                    assert parameter.grad is not None
                    parameter -= LEARNING_RATE * parameter.grad
        return losses, {name: p.grad.clone() for name, p in stage.canonical_parameters() if p.grad is not None}
    finally:
        torch.set_default_dtype(torch.float32)


def train(
    rank: int,
    world_size: int,
    pipe: int,
    schedule: str | Schedule,
    interval: int = 0,
    dropout: float = 0.3,
    payload_backend: str | None = None,
) -> tuple[list[float], dict[str, Tensor], dict[str, object]]:
    torch.set_default_dtype(torch.float64)
    try:
        topology = PipeDataParallelTopology(pipe, world_size // pipe)
        placement = tuple(range(pipe)) if isinstance(schedule, str) else schedule.placement
        module = language_model(len(placement), interval=interval, dropout=dropout)
        with Watcher(rank=rank, deadline_s=30.0) as watcher:
            tied = tied_ranks(module, placement)
            groups = PipeGroups(topology, tied=tied, watcher=watcher, payload_backend=payload_backend)
            stages = [module.build_stage(s) for s, holder in enumerate(placement) if holder == groups.pipe_rank]
            parameters = [parameter for stage in stages for parameter in stage.parameters()]
            exchange = PlainExchange(parameters, groups.replicas)
            meter = Meter()
            local = GLOBAL_MICRO_BATCHES // groups.num_replicas
            engine = PipelineEngine(
                stages,
                schedule=schedule,
                micro_batches=local,
                groups=groups,
                exchange=exchange,
                loss_fn=module.loss_fn,
                watcher=watcher,
                meter=meter,
                seed=SEED,
            )
            losses = []
            for step in range(STEPS):
                for parameter in parameters:
                    parameter.grad = None
                batches = [batch(step, groups.replica * local + index) for index in range(local)]
                losses.append(engine.train_step(batches, step=step).loss)
                with torch.no_grad():
                    for parameter in parameters:
                        assert parameter.grad is not None
                        parameter -= LEARNING_RATE * parameter.grad
            gradients = {
                name: p.grad.clone()
                for stage in stages
                for name, p in stage.canonical_parameters()
                if p.grad is not None
            }
            return losses, gradients, meter.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)


def check(answers: list[tuple[list[float], dict[str, Tensor], dict[str, object]]], expected: Run) -> None:
    losses, gradients = expected
    seen = set()
    for rank_losses, rank_gradients, _ in answers:
        assert rank_losses == answers[0][0], "ranks were told different losses"
        torch.testing.assert_close(rank_losses, losses, rtol=1e-10, atol=0)
        for name, gradient in rank_gradients.items():
            seen.add(name)
            error = (gradient - gradients[name]).norm() / gradients[name].norm()
            assert error <= 1e-10, f"{name}: relative error {error:.1e}"
    assert seen == set(gradients)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pipe", "data"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_every_layout_equals_one_process(pool: WorkerPool, pipe: int, data: int, schedule: str) -> None:
    check(pool.run(train, pipe * data, pipe, schedule), reference())


@pytest.mark.parametrize("interval", [1, 2])
def test_recomputed_activations_change_nothing(pool: WorkerPool, interval: int) -> None:
    check(pool.run(train, 2, 2, "1f1b", interval), reference())


@pytest.mark.parametrize(("interval", "seed"), [(0, 1), (0, 2), (2, 3)])
def test_several_stages_per_rank_and_split_backward_passes_change_nothing(
    pool: WorkerPool, interval: int, seed: int
) -> None:
    """A random order of a V-shaped placement, a part of its backward passes split."""
    schedule = v_shaped(2, GLOBAL_MICRO_BATCHES, random.Random(seed))
    check(pool.run(train, 2, 2, schedule, interval), reference())


def test_replicas_with_split_backward_passes(pool: WorkerPool) -> None:
    schedule = v_shaped(2, GLOBAL_MICRO_BATCHES // 2, random.Random(4))
    check(pool.run(train, 4, 2, schedule), reference())


def test_tensors_apart_from_their_frames_change_nothing(pool: WorkerPool) -> None:
    check(pool.run(train, 4, 2, "1f1b", payload_backend="gloo"), reference())


def test_two_runs_are_bitwise_equal(pool: WorkerPool) -> None:
    first, second = (pool.run(train, 4, 2, "1f1b") for _ in range(2))
    for (losses, gradients, _), (again, gradients_again, _) in zip(first, second, strict=True):
        assert losses == again
        assert all(torch.equal(gradient, gradients_again[name]) for name, gradient in gradients.items())
