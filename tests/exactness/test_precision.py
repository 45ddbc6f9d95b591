"""bf16 and fp16: float32 weights, products in 16 bits, steps that overflow skipped alike on every rank."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import penstock
from penstock.models.gpt import gpt_loss
from support.pool import WorkerPool
from support.run_jobs import LENGTH, VOCAB, config, model, resume_job

STEPS = 4
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.3)


def settings(precision: str, **changes: Any) -> dict[str, Any]:
    made = config(precision=precision, dropping=False, **changes)
    del made["schedule"]
    return made


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    rows = [torch.randint(VOCAB, (1, LENGTH + 1), generator=generator) for _ in range(8)]
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def train(rank: int, world_size: int, made: dict[str, Any]) -> tuple[list[float], list[Any], dict[str, Tensor]]:
    torch.set_num_threads(1)
    reports = []
    with penstock.initialize(model(dropout=0.0), made, optimizer=sgd) as engine:
        cut = engine.parts.cut

        def mine(step: int) -> Iterator[tuple[Tensor, Tensor]]:
            rows = batches(step)
            return iter([rows[index] for index in cut.indices()])

        losses = []
        for step in range(STEPS):
            losses.append(engine.train_batch(mine(step)))
            reports.append(engine.last)
        weights = {name: p.detach().clone() for name, p in engine.stage.canonical_parameters()}
    return losses, reports, weights


def reference(precision: str) -> tuple[list[float], dict[str, Tensor]]:
    """A plain loop in one process with torch's own autocast and a loss scaled by hand."""
    stage = model(dropout=0.0).partitioned(1).build_stage(0)
    parameters = dict(stage.canonical_parameters())
    optimizer = sgd(parameters.values())
    scale = 2.0**16 if precision == "fp16" else 1.0
    losses = []
    for step in range(STEPS):
        total = 0.0
        for inputs_BS, labels_BS in batches(step):
            with torch.autocast("cpu", dtype=DTYPES[precision]):
                loss = gpt_loss(stage(inputs_BS), labels_BS)
            (loss * scale).backward()
            total += loss.item() / 8
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad /= 8 * scale
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 2)])
def test_sixteen_bit_products_equal_torchs_own_autocast(
    pool: WorkerPool, precision: str, stages: int, replicas: int
) -> None:
    answers = pool.run(train, stages * replicas, settings(precision, stages=stages, replicas=replicas))
    wanted_losses, wanted = reference(precision)
    for losses, reports, weights in answers:
        assert losses == pytest.approx(wanted_losses, rel=1e-6)
        assert not any(report.skipped for report in reports)
        for name, tensor in weights.items():
            assert tensor.dtype == torch.float32
            # Gradients are sums of 16-bit products in another order.
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-5)


def test_steps_that_overflow_are_skipped_on_every_rank(pool: WorkerPool) -> None:
    made = settings("fp16", stages=2, replicas=2, fp16={"initial_scale_power": 40, "hysteresis": 1})
    answers = pool.run(train, 4, made)
    untouched = model(dropout=0.0).partitioned(1).build_stage(0)
    initial = dict(untouched.canonical_parameters())
    for _, reports, weights in answers:
        assert [report.skipped for report in reports] == [True] * STEPS
        assert [report.loss_scale for report in reports] == [2.0**power for power in (39, 38, 37, 36)]
        assert [report.samples for report in reports] == [8, 16, 24, 32]  # consumed all the same
        for name, tensor in weights.items():
            assert torch.equal(tensor, initial[name])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    made = config(precision=precision, steps=8)
    if precision == "fp16":  # scales move before and after the stop, by an overflow and by growth
        made["fp16"] = {"initial_scale_power": 30, "hysteresis": 1, "loss_scale_window": 3}
    whole = resume_job(0, 1, made, str(folder(tmp_path / "whole")), False, 8, 3)
    stopped = folder(tmp_path / "stopped")
    first = resume_job(0, 1, made, str(stopped), False, 3, 3)
    assert whole == first + resume_job(0, 1, made, str(stopped), True, 8, 3)


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_evaluation_computes_in_the_same_precision() -> None:
    with penstock.initialize(model(dropout=0.0), settings("bf16")) as engine:
        inputs_BS, labels_BS = batches(0)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            alone = gpt_loss(engine.stage(inputs_BS), labels_BS).item()
        assert engine.eval_batch(iter([(inputs_BS, labels_BS)] * 8)) == pytest.approx(alone, rel=1e-6)
        outputs = engine.predict_batch(iter([(inputs_BS, None)] * 8))
        assert outputs[0].dtype == torch.bfloat16


def test_loss_scaling_without_fp16_is_refused() -> None:
    with pytest.raises(ValueError, match="fp16 sets loss scaling, which precision=bf16 does not use"):
        penstock.initialize(model(), {**settings("bf16"), "fp16": {"loss_scale": 8.0}})
