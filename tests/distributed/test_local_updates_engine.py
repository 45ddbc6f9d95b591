"""Runs whose replicas train apart: under a pipeline with tied weights, stopped and resumed, evaluated and saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock.runtime.checkpoint import Checkpoint
from support.pool import WorkerPool
from support.run_jobs import config, model, resume_job, tokens

STEPS = 12
STOP = 7  # in the middle of every period below, with something on its way
STREAMING = {"method": "streaming_diloco", "period": 4, "fragments": 2, "overlap": 3, "algorithm": "onebit"}


def settings(local: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    result = config(stages=2, replicas=2, precision="float32", steps=STEPS, dropping=False)
    result["deadline_s"] = 20
    if local is not None:
        result["local_updates"] = local
    for key, value in changes.items():
        result[key] = {**result.get(key, {}), **value}
    return result


ZERO_ONE = {
    "name": "zero_one_adam",
    "options": {"var_freeze_step": 3, "var_update_scaler": 1, "local_step_scaler": 2, "local_step_clipper": 4},
}
RUNS: dict[str, dict[str, Any]] = {
    "local sgd": settings({"method": "local_sgd", "period": 4}, optimizer={"gradient_clipping": 1.0}),
    "streaming": settings(STREAMING),
    "muloco": settings({"method": "muloco", "period": 3, "algorithm": "onebit"}, optimizer={"name": "muon"}),
    "0/1 Adam": settings(optimizer=ZERO_ONE),
    "1-bit LAMB": settings(optimizer={"name": "onebit_lamb", "freeze_step": 3}),
}


def whole_and_in_two(rank: int, world_size: int, run: dict[str, Any], folder: str, stop: int) -> list[Any]:
    whole = resume_job(rank, world_size, run, f"{folder}/whole", False, STEPS, STEPS)
    first = resume_job(rank, world_size, run, f"{folder}/parts", False, stop, stop)
    second = resume_job(rank, world_size, run, f"{folder}/parts", True, STEPS, STEPS)
    return [whole, first + second]


@pytest.mark.parametrize("name", RUNS)
def test_stopped_between_exchanges_and_resumed(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    answers = pool.run(whole_and_in_two, 4, RUNS[name], str(tmp_path), STOP, deadline_s=100)
    for whole, parts in answers:
        assert parts == whole
        assert whole == answers[0][0]  # the mean over replicas that have gone apart
    assert answers[0][0][-1] < answers[0][0][0]
    whole, parts = (Checkpoint(tmp_path / part / f"step_{STEPS:08d}") for part in ("whole", "parts"))
    for layer in whole.layers:  # to the bit: common weights, moments, outer momentum
        mine, theirs = whole.read_layer(layer), parts.read_layer(layer)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def evaluations(rank: int, world_size: int, run: dict[str, Any], folder: str) -> list[Any]:
    """Losses of the same batch by the engine in the middle of a period, and by what it saved, on one replica each."""
    batch = torch.from_numpy(tokens(8)[0][None].copy())
    micro_batches = [(batch[:, :-1], batch[:, 1:])] * 4
    with penstock.initialize(model(dropout=0.0), run, training_data=tokens()) as engine:
        for _ in range(STOP):
            engine.train_batch()
        own = {name: p.detach().clone() for name, p in engine.stage.canonical_parameters()}
        loss = engine.eval_batch(iter(micro_batches))
        outputs = engine.predict_batch(iter(micro_batches))[0].clone()
        engine.save_checkpoint(folder)
        kept = all(torch.equal(p, own[name]) for name, p in engine.stage.canonical_parameters())
        losses = [engine.train_batch() for _ in range(2)]
    return [loss, outputs, kept, own, losses]


@pytest.mark.parametrize("name", ["streaming", "0/1 Adam"])
def test_what_is_evaluated_and_saved_are_the_weights_that_all_agree_on(
    pool: WorkerPool, tmp_path: Path, name: str
) -> None:
    run = settings(None if name == "0/1 Adam" else STREAMING, **({"optimizer": ZERO_ONE} if name == "0/1 Adam" else {}))
    ranks = pool.run(evaluations, 4, run, str(tmp_path), deadline_s=60)
    (first, second), (loss, outputs, *_) = (ranks[0][3], ranks[1][3]), ranks[0]
    assert any(not torch.equal(first[key], second[key]) for key in first)  # two replicas of the first stage: apart
    for answer in ranks:
        assert answer[0] == loss
        assert torch.equal(answer[1], outputs)
        assert answer[2]
    alone = {**run, "pipe": {"stages": 1}, "data_parallel": {"replicas": 1}, "optimizer": {"name": "adamw"}}
    alone.pop("local_updates", None)
    batch = torch.from_numpy(tokens(8)[0][None].copy())
    with penstock.initialize(model(dropout=0.0), alone) as engine:
        engine.load_checkpoint(tmp_path)
        assert engine.eval_batch(iter([(batch[:, :-1], batch[:, 1:])] * 8)) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["streaming", "0/1 Adam"])
def test_another_number_of_replicas_goes_on_and_owes_the_same(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    run = RUNS[name]
    pool.run(resume_job, 4, run, str(tmp_path), False, 8, 8, deadline_s=60)
    other = {**run, "data_parallel": {"replicas": 1}}
    losses = pool.run(resume_job, 2, other, str(tmp_path), True, STEPS, STEPS, deadline_s=60)
    assert len(losses[0]) == STEPS - 8
    assert losses[0] == losses[1]
    (tmp_path / f"step_{STEPS:08d}").rename(tmp_path / "last")
    more = {**run, "data_parallel": {"replicas": 4}, "pipe": {"stages": 1}}
    assert len(pool.run(resume_job, 4, more, str(tmp_path), True, STEPS, STEPS, deadline_s=60)[0]) == STEPS - 8
