"""Small whole runs for tests: the reference GPT on made-up tokens, trained by the engine in any layout."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

import penstock
from penstock.models.gpt import GPTConfig, gpt_layers, gpt_loss
from penstock.pipe.module import PipelineModule

VOCAB, LENGTH = 61, 24


def tokens(count: int = 96, seed: int = 7) -> list[np.ndarray[Any, Any]]:
    """Rows of ``LENGTH + 1`` tokens, some far more frequent than others: what a model learns first."""
    rng = np.random.default_rng(seed)
    frequency = 1.0 / np.arange(1, VOCAB + 1)
    return list(rng.choice(VOCAB, size=(count, LENGTH + 1), p=frequency / frequency.sum()))


def config(
    *,
    stages: int = 1,
    replicas: int = 1,
    schedule: str = "1f1b",
    precision: str = "float64",
    dropping: bool = True,
    steps: int = 20,
    optimizer: str = "adamw",
    **changes: Any,
) -> dict[str, Any]:
    """A configuration of 8 samples a step in micro-batches of one."""
    section: dict[str, Any] = {"name": optimizer, "lr": 1e-3, "weight_decay": 0.1}
    if optimizer == "onebit_adam":
        section["freeze_step"] = max(1, steps // 4)
    result: dict[str, Any] = {
        "seed": 11,
        "deadline_s": 30,
        "precision": precision,
        "pipe": {"stages": stages, "schedule": schedule},
        "data_parallel": {"replicas": replicas},
        "train": {"global_batch_size": 8, "micro_batch_size": 1, "steps": steps},
        "data": {"sequence_length": LENGTH},
        "optimizer": section,
        "schedule": {"warmup_steps": 4},
    }
    if dropping:
        result["random_ltd"] = {"layers": "middle", "min_tokens": 8, "steps": steps, "seq_per_step": 4}
    for key, value in changes.items():
        result[key] = value
    return result


def model(*, layers: int = 4, dropout: float = 0.1, vocabulary_parts: int = 1) -> PipelineModule:
    """A tiny GPT with tied embeddings, rotary positions and dropout."""
    shape = GPTConfig(
        vocab_size=VOCAB,
        num_layers=layers,
        hidden_size=16,
        num_heads=2,
        context_length=LENGTH,
        dropout=dropout,
        vocabulary_parts=vocabulary_parts,
    )
    return PipelineModule(gpt_layers(shape), loss_fn=gpt_loss)


def train(settings: dict[str, Any], steps: int) -> tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Train and give the losses, the gradients of this rank's parameters at every step, and its final weights."""
    gradients: list[dict[str, Tensor]] = []
    with penstock.initialize(model(), settings, training_data=tokens()) as engine:
        names = engine.parts.shared.names

        def keep(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            gradients.append(
                {
                    names[id(p)]: p.grad.clone()
                    for group in optimizer.param_groups
                    for p in group["params"]
                    if p.grad is not None
                }
            )

        engine.optimizer.register_step_pre_hook(keep)
        losses = [engine.train_batch() for _ in range(steps)]
        weights = {name: p.detach().clone() for name, p in engine.stage.canonical_parameters()}
    return losses, gradients, weights


def job(rank: int, world_size: int, settings: dict[str, Any], steps: int) -> Any:
    """:func:`train` on one rank of a pool."""
    torch.set_num_threads(1)
    return train(settings, steps)


def resume_job(
    rank: int, world_size: int, settings: dict[str, Any], folder: str, load: bool, steps: int, every: int
) -> list[float]:
    """Train up to step ``steps``, with a checkpoint every ``every`` steps, from the newest one if ``load``."""
    losses = []
    with penstock.initialize(model(), settings, training_data=tokens()) as engine:
        if load:
            engine.load_checkpoint(folder)
        while engine.progress.step < steps:
            losses.append(engine.train_batch())
            if engine.progress.step % every == 0:
                engine.save_checkpoint(folder)
            with (Path(folder) / f"losses_{rank}.txt").open("a") as told:
                told.write(f"{engine.progress.step} {losses[-1].hex()}\n")
    return losses
