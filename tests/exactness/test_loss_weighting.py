"""Micro-batches with different numbers of real tokens: the loss is the mean over all real tokens, in every layout."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

import penstock
from penstock.models.gpt import gpt_loss
from penstock.runtime.loss_weighting import count_labels
from support.pool import WorkerPool
from support.run_jobs import LENGTH, VOCAB, config, model

STEPS, MICRO_BATCHES, IGNORED = 3, 8, -100


def padded(step: int) -> list[tuple[Tensor, Tensor]]:
    """Eight micro-batches of one row of different lengths, one of them without a single label."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for number in range(MICRO_BATCHES):
        tokens_BT = torch.randint(VOCAB, (1, LENGTH + 1), generator=generator)
        inputs_BS, labels_BS = tokens_BT[:, :-1].clone(), tokens_BT[:, 1:].clone()
        labels_BS[:, number * 3 :] = IGNORED
        rows.append((inputs_BS, labels_BS))
    return rows


def sgd(parameters: Any) -> Optimizer:
    """Its step, unlike Adam's, shows the gradient's size."""
    return torch.optim.SGD(parameters, lr=0.5)


def train(rank: int, world_size: int, settings: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Tensor]]:
    torch.set_num_threads(1)
    with penstock.initialize(model(dropout=0.0), settings, optimizer=sgd) as engine:
        cut = engine.parts.cut

        def mine(step: int) -> Iterator[tuple[Tensor, Tensor]]:
            rows = padded(step)
            return iter([rows[index] for index in cut.indices()])

        losses = [engine.train_batch(mine(step)) for step in range(STEPS)]
        evaluated = [engine.eval_batch(mine(STEPS))]
        weights = {name: p.detach().clone() for name, p in engine.stage.canonical_parameters()}
    return losses, evaluated, weights


def reference() -> tuple[list[float], list[float], dict[str, Tensor]]:
    """One process, one batch of all rows, torch's own mean over the labels that count."""
    stage = model(dropout=0.0).partitioned(1).build_stage(0, dtype=torch.float64)
    parameters = dict(stage.canonical_parameters())
    optimizer = sgd(parameters.values())

    def loss(step: int) -> Tensor:
        inputs_BS, labels_BS = (torch.cat(part) for part in zip(*padded(step), strict=True))
        logits_BSV = stage(inputs_BS)
        return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED)

    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, [loss(STEPS).item()], {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_unequal_micro_batches_equal_one_batch_of_everything(pool: WorkerPool, stages: int, replicas: int) -> None:
    settings = config(stages=stages, replicas=replicas, dropping=False)
    del settings["schedule"]  # SGD keeps its rate
    answers = pool.run(train, stages * replicas, settings)
    wanted_losses, wanted_evaluated, wanted = reference()
    for losses, evaluated, weights in answers:
        assert losses == pytest.approx(wanted_losses, rel=1e-12)
        assert evaluated == pytest.approx(wanted_evaluated, rel=1e-12)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-10, atol=1e-13)


def test_what_counts_as_a_token() -> None:
    labels = torch.tensor([[1, IGNORED, 2], [IGNORED, 0, IGNORED]])
    assert count_labels(labels) == 3
    assert count_labels({"weights": torch.ones(2, 3), "labels": labels}) == 3
    assert count_labels(torch.zeros(5, 2)) == 5  # no labels: rows
    assert count_labels(torch.tensor(1.0)) == 1


def test_a_batch_without_any_label_is_refused() -> None:
    settings = config(dropping=False)
    empty = [(inputs, torch.full_like(labels, IGNORED)) for inputs, labels in padded(0)]
    with (
        penstock.initialize(model(), settings) as engine,
        pytest.raises(ValueError, match="no label in the global batch of 8 micro-batches is real"),
    ):
        engine.train_batch(iter(empty))


def test_micro_batches_may_count_alike_instead() -> None:
    settings = config(dropping=False, train={"global_batch_size": 2, "micro_batch_size": 1, "steps": 9})
    settings["train"]["loss_weighting"] = "micro_batches"
    rows = padded(0)[1:3]
    with penstock.initialize(model(dropout=0.0), settings) as engine:
        alone = [gpt_loss(engine.stage(x), y).item() for x, y in rows]
        assert engine.eval_batch(iter(rows)) == pytest.approx(sum(alone) / 2, rel=1e-12)
