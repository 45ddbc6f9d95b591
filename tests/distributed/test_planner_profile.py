"""Layers measured by several processes at once, and a model divided by what they found."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import penstock
from penstock._core.files import write_json
from penstock.data_pipeline.data_sampling import IndexedDatasetBuilder
from penstock.pipe import PipelineModule
from penstock.pipe.planner import LayerCosts, Profile, load_profiles
from penstock.pipe.schedule import get_schedule
from penstock.runtime import engine_costs, profiling, rehearsal
from penstock.runtime.comparison import comparison_lines, prediction_of, read_recording
from penstock.runtime.config import load_config
from penstock.runtime.planning import measure
from support.pool import WorkerPool
from support.run_jobs import config, model, tokens, train


@contextmanager
def quick() -> Iterator[None]:
    """Rounds enough to see that all is measured; how well is not for a test to say."""
    with (
        patch.multiple(profiling, _LEAST_ROUNDS=2, _LEAST_S=0.0, _REHEARSAL_S=0.0),
        patch.multiple(rehearsal, _WARM_UP=1, _LEAST=1),
        patch.multiple(engine_costs, _OVERHEAD_STEPS=2, _OVERHEAD_BATCHES=(2, 4), _MESSAGES=3, _ROUNDS=2, _TURNS=2),
    ):
        yield


def profile_job(rank: int, world_size: int, settings: dict[str, Any], file: str) -> None:
    with quick():
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
    with (
        quick(),
        penstock.initialize(measured, config(stages=2, steps=20), training_data=tokens()) as engine,
    ):
        assert engine.parts.module is not None
        bounds = engine.parts.module.bounds
        assert bounds is not None
        assert engine.config.pipe.partition_method == bounds  # what the run keeps says how to repeat it
        return bounds, [engine.train_batch(), engine.train_batch()]


def test_a_model_divided_by_its_profile_trains_as_any_other(pool: WorkerPool) -> None:
    expected = train(config(steps=20), 2)[0]
    found = pool.run(divided_job, 2)
    assert found[0][0] == found[1][0]
    for bounds, losses in found:
        assert len(bounds) == 3
        assert all(abs(a - b) < 1e-12 for a, b in zip(losses, expected, strict=True))


def recorded_job(rank: int, world_size: int, folder: str, schedule: str) -> list[float]:
    settings = config(stages=2, steps=20, schedule=schedule)
    settings |= {"output": folder, "pipe": {**settings["pipe"], "record_timeline": 2}}
    with penstock.initialize(model(), settings, training_data=tokens()) as engine:
        for _ in range(6):
            engine.train_batch()
        write_json(Path(folder) / "config.json", engine.config.to_dict())
        return [] if engine.parts.pipeline.recorded is None else [1.0]


def test_a_run_records_steps_in_the_form_of_a_prediction(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(recorded_job, 2, str(tmp_path), "zb_h1") == [[], []]
    names = sorted(path.name for path in (tmp_path / "timelines").iterdir())
    assert names == ["layout.json", "step_00000002.json", "step_00000003.json"]
    recording = read_recording(tmp_path)
    assert len(recording.seconds) == 2
    for timeline, seconds in zip(recording.timelines, recording.seconds, strict=True):
        schedule = timeline.schedule
        assert schedule.ranks == get_schedule("zb_h1", 2, schedule.micro_batches).ranks
        assert min(float(starts[0]) for starts in timeline.starts) == 0.0
        assert timeline.makespan < seconds
        ends = {(event.action.stage, event.action.op, event.action.micro_batch): event for event in timeline.events()}
        for number in range(schedule.micro_batches):
            # Both ranks' clocks are this machine's, so no stage starts before it can.
            assert ends[0, "F", number].end <= ends[1, "F", number].start
            assert ends[1, "I", number].end <= ends[0, "I", number].start
    layers = tuple(LayerCosts("x", 1.0, 2.0, 1.0, 1.0) for _ in range(recording.bounds[-1]))
    predicted = prediction_of(recording, [Profile(recording.micro_batch_size, layers)])
    lines = [line.split() for line in comparison_lines(predicted, recording)]
    assert lines[1][:3] == ["step", "ms", f"{1e3 * predicted.seconds:.2f}"]
    assert lines[1][3] == f"{1e3 * sum(recording.seconds) / 2:.2f}"
    assert ["rank", "1", "computes", "ms"] in [line[:4] for line in lines]
    assert {"0,F", "0,I", "0,W", "1,F", "1,I", "1,W"} == {line[1] + line[2] for line in lines if line[0] == "stage"}
    with pytest.raises(ValueError, match="the profile is of 1 layers in micro-batches of 9; measure again"):
        prediction_of(recording, [Profile(9, layers[:1])])
