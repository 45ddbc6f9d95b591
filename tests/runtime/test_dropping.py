import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop
from penstock.data_pipeline.random_ltd.protect import MarkProtectedTokens
from penstock.pipe import LayerSpec, PipelineModule
from penstock.runtime.config import load_config
from penstock.runtime.dropping import Dropping, block_indices
from support.pool import WorkerPool
from support.run_jobs import LENGTH, config, job, model, tokens, train


def test_the_blocks_are_the_longest_run_of_one_class() -> None:
    assert block_indices(model(layers=4)) == range(1, 5)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_each_stage_wraps_its_share_and_all_keep_the_same(stages: int) -> None:
    module = model(layers=4).partitioned(stages)
    wrapped: set[int] = set()
    for index in range(stages):
        dropping = Dropping(load_config(config(steps=10)), module)
        stage = module.build_stage(index)
        dropping.wrap(stage)
        layers = {int(n): layer for n, layer in stage.layers.items() if isinstance(layer, RandomLayerTokenDrop)}
        assert all(layer.layer_id == number for number, layer in layers.items())
        wrapped |= set(layers)
        # Linear from 8 to the whole sequence in 10 steps, in multiples of 4.
        kept = [dropping.update(step, step * 8 * LENGTH) for step in range(12)]
        assert kept == [8 + (step * (LENGTH - 8) // 10) // 4 * 4 for step in range(10)] + [LENGTH, LENGTH]
        assert all(layer.reserved_length == LENGTH for layer in layers.values())
    assert wrapped == {2, 3}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"steps": 11}, r"steps=11 \(from 0\): the run has 10 steps and ends before all .* lower it to 10 or less"),
        ({"steps": 9, "start": 2}, r"steps=9 \(from 2\): .* lower it to 8 or less"),
        ({"steps": 9, "start": 10}, "start=10: the run has 10 steps, so no token is dropped"),
        ({"tokens": 80 * LENGTH + 1}, rf"tokens={80 * LENGTH + 1} .*the run has {80 * LENGTH} tokens and ends"),
        ({"steps": 10}, None),
        ({"steps": 99, "end": 10}, None),
        ({"tokens": 80 * LENGTH}, None),
    ],
)
def test_steps_that_a_run_never_reaches_are_told(section: dict[str, int], message: str | None) -> None:
    settings = load_config(config(steps=10, random_ltd={"min_tokens": 8, **section}))
    found = Dropping(settings, model(layers=4)).unreached
    assert found is None if message is None else re.search(message, found or "")


def test_they_are_told_where_a_run_begins(caplog: pytest.LogCaptureFixture) -> None:
    settings = config(steps=6, random_ltd={"min_tokens": 8, "steps": 7})
    penstock.initialize(model(), settings, training_data=tokens()).close()
    assert [record.message for record in caplog.records if "random_ltd.steps=7" in record.message]


def test_every_key_of_the_section_reaches_the_layers() -> None:
    module = model(layers=6).partitioned(1)
    section = {
        "layers": [1, 2, 3, 5],
        "min_tokens": 8,
        "tokens": 8 * LENGTH * 10,
        "growth": "root",
        "root_degree": 2,
        "seq_per_step": 1,
        "start": 8 * LENGTH * 2,
        "end": 8 * LENGTH * 9,
        "route": "block",
        "arguments": {"position_ids": "B S"},
        "protect_tokens": [3],
    }
    dropping = Dropping(load_config(config(random_ltd=section, dropping=False)), module)
    stage = module.build_stage(0)
    dropping.wrap(stage)
    layers = [layer for layer in stage.layers.values() if isinstance(layer, RandomLayerTokenDrop)]
    assert [(layer.route, layer.layer_id) for layer in layers] == [("begin", 2), ("inside", 2), ("end", 2), (None, 6)]
    assert all(layer.rule.kind_of("position_ids") == "B S" for layer in layers)
    kept = [dropping.update(step, 8 * LENGTH * step) for step in range(11)]
    growing = [8 + int(((step - 2) / 10) ** 0.5 * (LENGTH - 8)) for step in range(2, 9)]
    assert kept == [LENGTH, LENGTH, *growing, LENGTH, LENGTH]
    # Six blocks, of which four compute 10 of 24 tokens of each of 8 samples.
    assert dropping.layer_tokens(8 * LENGTH, 10, rows=8) == 8 * (2 * LENGTH + 4 * 10)
    value = stage.layers["0"](torch.tensor([[1, 3, 2, 3]]))
    assert value["protected_tokens"].tolist() == [[False, True, False, True]]


def rates_of(settings: dict[str, Any]) -> tuple[list[float], int]:
    """The learning rates of eight steps and the layer-tokens in them."""
    rates = []
    with penstock.initialize(model(), settings, training_data=tokens()) as engine:
        for _ in range(8):
            engine.train_batch()
            assert engine.last is not None
            rates.append(engine.last.lr)
        return rates, engine.progress.layer_tokens


def kept_at(step: int) -> int:
    return 8 + (step * (LENGTH - 8) // 8) // 4 * 4


def test_a_learning_rate_by_layer_tokens() -> None:
    by_layer_tokens = {"by": "layer_tokens", "warmup_steps": 2, "decay": "linear", "min_ratio": 0.0}
    rates, count = rates_of({**config(steps=8), "schedule": by_layer_tokens})
    layer_tokens = [8 * (2 * LENGTH + 2 * kept_at(step)) for step in range(8)]
    before = [sum(layer_tokens[:step]) for step in range(9)]
    decay = [1 - (before[step] - before[2]) / (before[8] - before[2]) for step in range(2, 8)]
    assert rates == pytest.approx([1e-3 * before[1] / before[2], 1e-3, *(1e-3 * one for one in decay)])
    assert count == before[8]
    section: dict[str, Any] = {
        "total_layer_num": 4,
        "random_ltd_layer_num": 2,
        "random_ltd_layer_id": [1, 2],
        "random_ltd_schedule": {
            "min_value": 8,
            "max_value": LENGTH,
            "schedule_config": {"require_steps": 8, "seq_per_step": 4},
        },
        "layer_token_lr_schedule": {
            "enabled": True,
            "total_layer_tokens": before[8],
            "warmup_layer_tokens": before[2],
            "warmup_type": "linear",
        },
    }
    settings = config(steps=8, random_ltd=section)
    del settings["schedule"]
    assert rates_of(settings)[0] == pytest.approx(rates)
    section["layer_token_lr_schedule"]["warmup_type"] = "log"
    first = 1e-3 * math.log(1 + before[1]) / math.log(1 + before[2])
    assert rates_of(settings)[0] == pytest.approx([first, *rates[1:]])


def test_the_clock_of_layer_tokens_goes_on_where_a_checkpoint_stood(tmp_path: Path) -> None:
    settings = {**config(steps=8), "schedule": {"by": "layer_tokens"}}
    with penstock.initialize(model(), settings, training_data=tokens()) as engine:
        for _ in range(3):
            engine.train_batch()
        engine.save_checkpoint(tmp_path)
        expected = engine.train_batch()
        assert engine.last is not None
        rate, count = engine.last.lr, engine.progress.layer_tokens
    with penstock.initialize(model(), settings, training_data=tokens()) as engine:
        engine.load_checkpoint(tmp_path)
        assert engine.train_batch() == expected
        assert engine.last is not None
        assert (engine.last.lr, engine.progress.layer_tokens) == (rate, count)


ROUTE = {
    "layers": [0, 1, 2],
    "min_tokens": 8,
    "steps": 8,
    "seq_per_step": 4,
    "route": "block",
    "protect_tokens": [40, 50],
}


@pytest.mark.parametrize(
    ("schedule", "stages", "interval"), [("1f1b", 2, 1), ("1f1b", 4, 2), ("zb_h1", 2, 0), ("zb_h1", 4, 0)]
)
def test_a_route_across_stages_is_the_route_of_one_process(
    pool: WorkerPool, schedule: str, stages: int, interval: int
) -> None:
    losses, gradients, _ = train(config(steps=8, random_ltd=ROUTE), 4)
    plain, _, _ = train(config(steps=8, dropping=False), 4)
    assert losses[0] != plain[0]
    settings = config(steps=8, random_ltd=ROUTE, stages=stages, schedule=schedule)
    settings["pipe"]["activation_checkpoint_interval"] = interval
    for rank_losses, rank_gradients, _ in pool.run(job, stages, settings, 4, deadline_s=60):
        assert rank_losses == pytest.approx(losses, rel=1e-10)
        for mine, theirs in zip(rank_gradients, gradients, strict=True):
            for name, gradient in mine.items():
                torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_ltd": {"min_tokens": 8}}, "give exactly one of steps and tokens"),
        ({"random_ltd": {"min_tokens": 8, "steps": 5, "tokens": 5}}, "give exactly one of steps and tokens"),
        ({"random_ltd": {"min_tokens": 8, "steps": 5, "growth": "root"}}, "growth: root needs root_degree"),
        ({"random_ltd": {"min_tokens": 8, "steps": 5, "root_degree": 2}}, "root_degree=2.0 with growth: linear; set"),
        ({"random_ltd": {"min_tokens": 8, "steps": 5, "start": 9, "end": 9}}, "end=9 is not after start=9"),
        ({"schedule": {"by": "layer_tokens"}}, "this run has no random_ltd; set schedule.by"),
        (
            {
                "random_ltd": {
                    "min_tokens": 8,
                    "steps": 5,
                    "layer_token_lr_schedule": {"enabled": True, "total_layer_tokens": 5},
                }
            },
            "layer_token_lr_schedule and schedule both set the learning rate",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config({**config(dropping=False), **changes})


def test_protected_tokens_need_token_ids_and_layers_that_pass_a_dict_on() -> None:
    marking = MarkProtectedTokens(torch.nn.Identity(), token_ids=(1,))
    with pytest.raises(ValueError, match="Identity returns Tensor; let it return a dict"):
        marking(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be integers"):
        marking({"hidden": torch.zeros(2, 3, 4)})


def test_protected_tokens_are_not_looked_for_in_hidden_states() -> None:
    blocks = PipelineModule([LayerSpec(torch.nn.Linear, 8, 8) for _ in range(3)], loss_fn=torch.nn.functional.mse_loss)
    section = {"layers": [0, 1], "min_tokens": 8, "steps": 8}
    settings = load_config(config(steps=8, random_ltd={**section, "document_separator": 3}))
    with pytest.raises(ValueError, match="take block 0 out of"):
        Dropping(settings, blocks)
    assert Dropping(load_config(config(steps=8, random_ltd=section)), blocks).layers == {0, 1}
