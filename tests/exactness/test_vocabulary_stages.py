"""A vocabulary whose parts lie on several stages: the run is that of one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import penstock
from penstock._core.meter import Meter
from penstock.runtime.sharding.tensors import full_tensor
from support.pool import WorkerPool
from support.run_jobs import config, model, tokens

STEPS = 3
# Three parts of the embedding, three blocks, the norm, three parts of the output layer.
TWO, FOUR = [0, 8, 10], [0, 2, 5, 8, 10]


def settings(stages: int = 1, bounds: list[int] | None = None, *, dropping: bool = True, **changes: Any) -> Any:
    made = config(stages=stages, steps=STEPS, dropping=dropping, **changes)
    made["train"] = {"global_batch_size": 4, "micro_batch_size": 1, "steps": STEPS}
    made["optimizer"]["gradient_clipping"] = 0.5
    made["schedule"] = {"decay": "constant"}
    if bounds is not None:
        made["pipe"]["partition_method"] = bounds
    return made


def pairs(count: int) -> Iterator[Any]:
    rows = torch.stack([torch.from_numpy(row) for row in tokens(count)])
    return iter([(row[None, :-1], row[None, 1:]) for row in rows])


def run(rank: int, world_size: int, made: dict[str, Any], dropout: float) -> Any:
    """Losses, an evaluation, logits and whole weights."""
    torch.set_num_threads(1)
    module = model(layers=3, dropout=dropout, vocabulary_parts=3)
    with penstock.initialize(module, made, training_data=tokens()) as engine:
        losses = [engine.train_batch() for _ in range(STEPS)]
        evaluated = engine.eval_batch(pairs(4))
        logits = engine.predict_batch(pairs(4))
        weights = {
            name: full_tensor(p.detach(), groups=engine.parts.groups, meter=Meter()).clone()
            for name, p in engine.stage.canonical_parameters()
        }
    return losses, evaluated, logits, weights


@pytest.mark.parametrize(
    ("made", "dropout"),
    [
        (settings(2, TWO, schedule="zb_h1"), 0.1),
        (settings(2, FOUR, schedule="interleaved_1f1b"), 0.1),
        (settings(2, TWO, schedule="seq1f1b", dropping=False), 0.0),
        (settings(tensor_parallel={"size": 2}), 0.1),
    ],
    ids=["zb_h1", "interleaved", "slices", "tensor_parallel"],
)
def test_parts_on_several_stages_equal_one_process(pool: WorkerPool, made: dict[str, Any], dropout: float) -> None:
    answers = pool.run(run, 2, made, dropout)
    alone = run(0, 1, settings(dropping="random_ltd" in made), dropout)
    names = set()
    for losses, evaluated, logits, weights in answers:
        assert losses == pytest.approx(alone[0], rel=1e-11)
        assert evaluated == pytest.approx(alone[1], rel=1e-11)
        for mine, expected in zip(logits, alone[2], strict=True):
            assert mine.shape == (1, 24, 61)
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone[3][name], rtol=1e-9, atol=1e-12)
            names.add(name)
    assert names == set(alone[3])
