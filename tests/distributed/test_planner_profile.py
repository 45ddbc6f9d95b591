"""Layers measured by several processes at once, and a model divided by what they found."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

import penstock
from penstock.data_pipeline.data_sampling import IndexedDatasetBuilder
from penstock.pipe import PipelineModule
from penstock.pipe.planner import load_profiles
from penstock.runtime.config import load_config
from penstock.runtime.planning import measure
from support.pool import WorkerPool
from support.run_jobs import config, model, tokens, train


def profile_job(rank: int, world_size: int, settings: dict[str, Any], file: str) -> None:
    measure(load_config(settings), [1, 2], Path(file))


def test_every_layer_is_measured_by_the_processes_together(pool: WorkerPool, tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as builder:
        builder.add_item(np.arange(200) % 16)
        builder.end_document()
    settings = {
        "model": {"vocab_size": 16, "num_layers": 2, "hidden_size": 8, "num_heads": 2, "context": 8},
        "pipe": {"stages": 2},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 3},
        "data": {"train": str(tmp_path / "corpus")},
        "optimizer": {"gradient_clipping": 1.0},
    }
    pool.run(profile_job, 2, settings, str(tmp_path / "profile.json"))
    small, large = load_profiles(tmp_path / "profile.json")
    assert [small.micro_batch_size, large.micro_batch_size] == [1, 2]
    assert small.concurrent == 2
    names = ["TokenEmbedding", "GPTBlock", "GPTBlock", "FinalNorm", "TokenEmbedding"]
    assert [layer.name for layer in small.layers] == names
    for layer, double in zip(small.layers, large.layers, strict=True):
        assert layer.state == 3 * layer.parameters or layer.tie == "embedding" or "GPTBlock" in layer.name
        assert double.output == 2 * layer.output
        assert layer.parameters == double.parameters
        assert min(layer.forward, layer.backward, layer.update) > 0
    # Layers that are described alike count as one sample, though each rank measured one of them.
    first, second = small.layers[1:3]
    assert first == replace(second, shared=first.shared)
    # Hidden values, and beside them the positions but for the last.
    assert [layer.output for layer in small.layers[:4]] == [8 * 8 * 4 + 8 * 8] * 3 + [8 * 8 * 4]
    assert json.loads((tmp_path / "profile.json").read_text())["profiles"][0]["layers"][1] == {
        **asdict(first),
        "whole": [],
    }


def divided_job(rank: int, world_size: int) -> tuple[tuple[int, ...], list[float]]:
    given = model()
    measured = PipelineModule(given.specs, loss_fn=given.loss_fn, base_seed=given.base_seed, partition_method="profile")
    with penstock.initialize(measured, config(stages=2, steps=20), training_data=tokens()) as engine:
        assert engine.parts.module is not None
        bounds = engine.parts.module.bounds
        assert bounds is not None
        return bounds, [engine.train_batch(), engine.train_batch()]


def test_a_model_divided_by_its_profile_trains_as_any_other(pool: WorkerPool) -> None:
    expected = train(config(steps=20), 2)[0]
    found = pool.run(divided_job, 2)
    assert found[0][0] == found[1][0]
    for bounds, losses in found:
        assert len(bounds) == 3
        assert all(abs(a - b) < 1e-12 for a, b in zip(losses, expected, strict=True))
