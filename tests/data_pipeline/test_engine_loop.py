"""The same loop over Penstock's engine and over a plain module gives the same training."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penstock
from penstock.data_pipeline import create_data_loader, execute_data_pipeline
from penstock.pipe.module import LayerSpec, PipelineModule
from support.loop_models import make_points


def _engine() -> Any:
    layers = [LayerSpec(nn.Linear, 3, 8), LayerSpec(nn.Tanh), LayerSpec(nn.Linear, 8, 1)]
    module = PipelineModule(layers, num_stages=1, loss_fn=F.mse_loss)
    config = {
        "precision": "float64",
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "steps": 100},
        "optimizer": {"name": "adamw", "lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0},
        "schedule": {"decay": "constant"},
    }
    return penstock.initialize(module, config)


def test_an_engine_trains_as_the_module_does() -> None:
    points = make_points(36)
    double = torch.utils.data.TensorDataset(*(tensor.double() for tensor in points.tensors))
    loader = create_data_loader(double, {"data_loader_params": {"batch_size": 4}})
    engine = _engine()
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    weights = [parameter for _, parameter in engine.stage.canonical_parameters()]
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), weights, strict=True):
            mine.copy_(theirs)
    by_engine = execute_data_pipeline(engine, loader, {"epochs": 2})
    # Nine batches: the engine leaves the ninth out, so the module gets eight.
    eight = [batch for batch, _ in zip(loader, range(8), strict=False)]
    settings = {"loss_fn": "mse", "gradient_accumulation_steps": 2, "epochs": 2}
    optimizer = {"name": "adamw", "lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
    by_module = execute_data_pipeline(model, eight, settings | {"optimizer": optimizer})
    assert [r["loss"] for r in by_engine] == pytest.approx([r["loss"] for r in by_module], rel=1e-10)
    assert [(r["epoch"], r["batches"]) for r in by_engine] == [(0, 2)] * 4 + [(1, 2)] * 4
    means = [r["loss"] for r in execute_data_pipeline(model, eight, {"mode": "eval", "loss_fn": "mse"})]
    expected = [(a + b) / 2 for a, b in zip(means[::2], means[1::2], strict=True)]
    assert [r["loss"] for r in execute_data_pipeline(engine, loader, {"mode": "eval"})] == pytest.approx(expected)
    outputs = [r["outputs"] for r in execute_data_pipeline(engine, loader, {"mode": "predict"})]
    flat = torch.cat([output for step in outputs for output in step])
    assert torch.allclose(flat, torch.cat([model(x) for x, _ in eight]), rtol=1e-9)
