"""Steps that differ in samples and tokens are the same steps on every layout, and what they mean is what they say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import penstock
from penstock.data_pipeline.datasets import TokenCollator
from penstock.runtime.checkpoint import Checkpoint
from penstock.runtime.feed import Feed
from support.batching_jobs import job, rows
from support.pool import WorkerPool
from support.run_jobs import config, model

BUDGET = {"token_budget": {"max_tokens": 48, "window": 40}, "lr_scaling": "sqrt"}
SIZES = {"sizes": [[400, 12], [900, 16]], "lr_scaling": "linear"}
RESHAPE = {
    "sequence_length": {
        "mode": "reshape",
        "schedule_type": "fixed_discrete",
        "schedule_config": {"difficulty": [6, 12, 24], "max_step": [1, 3]},
    }
}
TRUNCATE = {"sequence_length": {**RESHAPE["sequence_length"], "mode": "truncate"}}


def settings(batching: dict[str, Any], **layout: int) -> dict[str, Any]:
    train = {"global_batch_size": 8, "micro_batch_size": 2, "steps": 9}
    return config(dropping=False, batching=batching, train=train, **layout)


@pytest.mark.parametrize("batching", [BUDGET, SIZES, RESHAPE, TRUNCATE], ids=["budget", "sizes", "reshape", "truncate"])
def test_layouts_and_restarts_change_nothing(pool: WorkerPool, tmp_path: Path, batching: dict[str, Any]) -> None:
    ragged = batching is BUDGET
    whole = job(0, 1, settings(batching), ragged, str(tmp_path / "whole"), False, 9)
    first = job(0, 1, settings(batching), ragged, str(tmp_path / "parts"), False, 4)
    ranks = pool.run(job, 2, settings(batching, stages=2), ragged, str(tmp_path / "parts"), True, 2, deadline_s=60)
    last = pool.run(job, 2, settings(batching, replicas=2), ragged, str(tmp_path / "parts"), True, 3, deadline_s=60)
    assert ranks[0] == ranks[1]
    for got, expected in zip([*first, *ranks[0], *last[0]], whole, strict=True):
        assert got == pytest.approx(expected, rel=1e-9)
    # All of it has been accounted for alike, by whatever rank read it.
    accounts = [Checkpoint(tmp_path / name / "step_00000009").read_state()["consumed"] for name in ("whole", "parts")]
    assert accounts[0][-1] == accounts[1][-1]
    assert accounts[0][-1]["count"] == whole[-1][2]
    (rank,) = Checkpoint(tmp_path / "whole" / "step_00000009").read_state()["ranks"]
    assert rank["ledger"]["spent"]["tokens"] == whole[-1][3]


def test_the_loss_of_a_budgeted_step_is_the_mean_over_its_tokens() -> None:
    data = rows()
    with penstock.initialize(model(dropout=0.0), settings(BUDGET), training_data=data) as engine:
        parts = engine.parts
        assert isinstance(parts.feed, Feed)
        assert parts.order is not None
        for _ in range(3):
            step = parts.feed.step(engine.progress.step, samples=engine.progress.samples, tokens=0)
            places = np.concatenate([batch.positions for batch in step.batches if batch.weight])
            total, count = torch.zeros((), dtype=torch.float64), 0
            for sample in parts.order.sample_at(places).tolist():
                inputs, labels = TokenCollator()([data[sample]])
                with torch.no_grad():
                    value: Any = inputs
                    for layer in engine.stage.layers.values():
                        value = layer(value)
                total += F.cross_entropy(value.flatten(0, 1), labels.flatten(), reduction="sum")
                count += labels.numel()
            assert engine.train_batch() == pytest.approx((total / count).item(), rel=1e-10)
            assert engine.progress.tokens == count or engine.progress.step > 1
            assert step.tokens == count


def test_batches_of_growing_size_and_length_read_what_they_say() -> None:
    sizes = job(0, 1, settings(SIZES), False, None, False, 6)
    # 8 samples of 24 tokens until 400 are consumed, then 12 until 900, then 16.
    assert [samples for _, _, samples, _ in sizes] == [8, 16, 24, 36, 48, 64]
    unscaled = job(0, 1, settings({**SIZES, "lr_scaling": "none"}), False, None, False, 6)
    ratios = [scaled[1] / plain[1] for scaled, plain in zip(sizes, unscaled, strict=True)]
    assert ratios == pytest.approx([1, 1, 1, 1.5, 1.5, 2])
    truncated = job(0, 1, settings(TRUNCATE), False, None, False, 5)
    assert [tokens for *_, tokens in truncated] == [48, 96, 192, 288, 480]
    reshaped = job(0, 1, settings(RESHAPE), False, None, False, 5)
    assert [tokens for *_, tokens in reshaped] == [192, 384, 576, 768, 960]


def test_given_batches_and_a_batching_section_contradict_each_other() -> None:
    engine = penstock.initialize(model(), settings(BUDGET), training_data=rows())
    with engine, pytest.raises(ValueError, match="remove one of them"):
        engine.train_batch(iter([]))
    with pytest.raises(ValueError, match=r"set data\.train or training_data"):
        penstock.initialize(model(), settings(BUDGET))
