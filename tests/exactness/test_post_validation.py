"""Stepping on trust: bit for bit the run that waits for the norm, whatever the validation says."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import penstock
from penstock.runtime.engine import Engine, NotFiniteError
from support.pool import WorkerPool
from support.run_jobs import config, model, tokens

STEPS = 4


def settings(
    trust: bool, *, stages: int = 2, replicas: int = 1, schedule: str = "zb_h2", limit: float | None = 1.0, **pipe: Any
) -> dict[str, Any]:
    made = config(stages=stages, replicas=replicas, schedule=schedule, steps=STEPS, precision="float32")
    made["optimizer"] |= {"lr": 1e-2, "gradient_clipping": limit, "post_validation": trust}
    made["schedule"] = {"warmup_steps": 2}
    made["pipe"] |= pipe
    return made


def state_of(engine: Engine) -> dict[str, Tensor]:
    names = engine.parts.shared.names
    found = {name: p.detach().clone() for name, p in engine.stage.canonical_parameters()}
    for parameter, state in engine.optimizer.state.items():
        found |= {f"{names[id(parameter)]} {key}": value.clone() for key, value in state.items()}
    return found


def train(rank: int, world_size: int, made: dict[str, Any], bad_step: int | None = None) -> dict[str, Any]:
    """Train; the gradients of the last rank are NaN at one step, once."""
    torch.set_num_threads(1)
    losses: dict[int, float] = {}
    norms, errors, provisional = [], [], []
    with penstock.initialize(model(), made, training_data=tokens()) as engine:
        if bad_step is not None and rank == world_size - 1:
            weight = next(p for p in engine.stage.parameters() if p.requires_grad)
            once = [True]

            def spoil(gradient: Tensor) -> Tensor:
                if engine.progress.step != bad_step or not once:
                    return gradient
                once.clear()
                return gradient * math.nan

            weight.register_hook(spoil)
        while engine.progress.step < STEPS:
            step = engine.progress.step
            try:
                losses[step] = engine.train_batch()
                if step % 2 or engine.progress.step == STEPS:  # other steps are validated by the next one
                    before = [p.detach().clone() for p in engine.stage.parameters()]
                    engine.validate()
                    now = engine.stage.parameters()
                    provisional.append(any(not torch.equal(p, b) for p, b in zip(now, before, strict=True)))
                assert engine.last is not None
                norms.append(engine.last.gradient_norm)
            except NotFiniteError as error:
                errors.append((str(error), engine.progress.step, engine.progress.samples, engine.progress.tokens))
        state = state_of(engine)
    return {"losses": losses, "norms": norms, "errors": errors, "state": state, "provisional": any(provisional)}


def check(trusting: list[Any], waiting: list[Any]) -> None:
    for mine, theirs in zip(trusting, waiting, strict=True):
        assert mine["losses"] == theirs["losses"]
        assert mine["errors"] == theirs["errors"]
        assert mine["state"].keys() == theirs["state"].keys()
        for name, tensor in theirs["state"].items():
            assert torch.equal(mine["state"][name], tensor), name


@pytest.mark.parametrize(
    ("layout", "processes"),
    [
        ({"stages": 1, "schedule": "1f1b"}, 1),
        ({"stages": 4, "schedule": "zb_h2", "partition_method": "uniform"}, 4),
        ({"stages": 2, "schedule": "zb_v", "replicas": 2, "activation_checkpoint_interval": 1}, 4),
    ],
)
def test_some_steps_clipped_and_some_not(pool: WorkerPool, layout: dict[str, Any], processes: int) -> None:
    free = pool.run(train, processes, settings(False, limit=1e9, **layout))[0]["norms"]
    limit = sorted(free)[STEPS // 2]
    waiting = pool.run(train, processes, settings(False, limit=limit, **layout))
    norms = waiting[0]["norms"]
    assert any(norm > limit for norm in norms)
    assert any(norm <= limit for norm in norms)
    trusting = pool.run(train, processes, settings(True, limit=limit, **layout))
    check(trusting, waiting)
    for mine in trusting:
        assert all(norm is None or norm == wanted for norm, wanted in zip(mine["norms"], norms, strict=True))
        assert mine["norms"][-1] == norms[-1]
    assert any(mine["provisional"] for mine in trusting)
    assert not any(mine["provisional"] for mine in waiting)


@pytest.mark.parametrize("limit", [0.5, None])
def test_a_gradient_that_is_not_finite_takes_the_step_back(pool: WorkerPool, limit: float | None) -> None:
    made = settings(True, limit=limit)
    trusting = pool.run(train, 2, made, 2)
    assert [error[0][:34] for error in trusting[0]["errors"]] == ["step 2: the gradient norm is nan; "]
    assert trusting[0]["errors"][0][1:] == (2, 16, trusting[0]["errors"][0][3])
    if limit is None:  # the run that waits looks at each rank's own gradients only, and would end there
        check([{**rank, "errors": []} for rank in trusting], pool.run(train, 2, settings(False, limit=limit)))
    else:
        check(trusting, pool.run(train, 2, settings(False, limit=limit), 2))


def saving(rank: int, world_size: int, made: dict[str, Any], folder: str, load: bool, stop: int) -> Any:
    torch.set_num_threads(1)
    losses = []
    with penstock.initialize(model(), made, training_data=tokens()) as engine:
        if load:
            engine.train_batch()  # a step on trust, which the checkpoint replaces
            engine.load_checkpoint(folder)
        while engine.progress.step < stop:
            losses.append(engine.train_batch())
        if not load:
            engine.save_checkpoint(folder)
        evaluated = engine.eval_batch(iter([(torch.zeros(1, 24).long(), torch.zeros(1, 24).long())] * 8))
        return losses, evaluated, state_of(engine)


def test_checkpoints_and_evaluation_see_validated_weights(pool: WorkerPool, tmp_path: Path) -> None:
    """The limit is so low that every step on trust is taken back."""
    folders = {trust: tmp_path / str(trust) for trust in (False, True)}
    found = {}
    for trust, folder in folders.items():
        folder.mkdir()
        made = settings(trust, limit=0.05)
        first = pool.run(saving, 2, made, str(folder), False, 2)
        found[trust] = [first, pool.run(saving, 2, made, str(folder), True, STEPS)]
    for part in (0, 1):
        for mine, theirs in zip(found[True][part], found[False][part], strict=True):
            assert mine[:2] == theirs[:2]
            for name, tensor in theirs[2].items():
                assert torch.equal(mine[2][name], tensor), name


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"precision": "fp16"}, "take precision: bf16"),
        ({"local_updates": {"method": "local_sgd", "period": 2}, "data_parallel": {"replicas": 2}}, "remove local_upd"),
        ({"data_parallel": {"replicas": 2, "sharding": "fsdp2"}}, "set sharding: none"),
        ({"optimizer": {"name": "muon", "post_validation": True}}, "take name: adamw"),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        penstock.initialize(model(), {**settings(True, stages=1, schedule="1f1b"), **changes}, training_data=tokens())


def test_an_optimizer_of_ones_own_is_refused() -> None:
    with pytest.raises(ValueError, match="takes back steps of the configuration's adamw"):
        penstock.initialize(
            model(), settings(True, stages=1, schedule="1f1b"), optimizer=torch.optim.AdamW, training_data=tokens()
        )
