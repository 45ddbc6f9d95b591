"""FSDP2 under a pipeline: parameters, gradients and optimizer state in parts, results as in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock._core.meter import Meter
from penstock.runtime.preparation import prepare
from penstock.runtime.sharding.tensors import full_tensor
from support.pool import WorkerPool
from support.run_jobs import config, model, resume_job, tokens

STEPS = 6


def settings(stages: int, replicas: int, **changes: Any) -> dict[str, Any]:
    made = config(stages=stages, replicas=replicas, steps=STEPS, **changes)
    made["optimizer"]["gradient_clipping"] = 0.5
    if replicas > 1:
        made["data_parallel"]["sharding"] = "fsdp2"
    return made


def sharded(rank: int, world_size: int, made: dict[str, Any]) -> Any:
    """Losses, norms and whole weights of a sharded run, and how many numbers of weights and moments lie here."""
    torch.set_num_threads(1)
    with penstock.initialize(model(), made, training_data=tokens()) as engine:
        losses, norms = [], []
        for _ in range(STEPS):
            losses.append(engine.train_batch())
            assert engine.last is not None
            norms.append(engine.last.gradient_norm)
        evaluated = engine.eval_batch(iter([pair() for _ in range(engine.parts.cut.micro_batches)]))
        weights = {
            name: full_tensor(p.detach(), groups=engine.parts.groups, meter=Meter()).clone()
            for name, p in engine.stage.canonical_parameters()
        }
        moments = [value for state in engine.optimizer.state.values() for value in state.values()]
        held = sum(part(p).numel() for _, p in engine.stage.canonical_parameters())
        held_moments = sum(part(value).numel() for value in moments if value.dim())
        all_weights = sum(p.numel() for _, p in engine.stage.canonical_parameters())
        tied = sum(p.numel() for pairs in engine.stage.tied.values() for _, p in pairs)
    return losses, norms, evaluated, weights, (held, held_moments, all_weights, tied)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.from_numpy(tokens(1)[0])[None]
    return row[:, :-1].contiguous(), row[:, 1:].contiguous()


def part(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize(
    ("stages", "replicas", "changes"),
    [
        (1, 2, {}),
        (2, 2, {"pipe": {"stages": 2, "schedule": "interleaved_1f1b"}}),
        (2, 2, {"pipe": {"stages": 2, "activation_checkpoint_interval": 1}}),
        (2, 2, {"pipe": {"stages": 2, "schedule": "zb_h1"}}),
        (2, 2, {"pipe": {"stages": 2, "schedule": "zb_v", "activation_checkpoint_interval": 1}}),
        (1, 3, {"data_parallel": {"replicas": 3, "sharding": "fsdp2", "reshard_after_forward": True}}),
    ],
)
def test_a_sharded_run_equals_one_process(
    pool: WorkerPool, stages: int, replicas: int, changes: dict[str, Any]
) -> None:
    batch = {"global_batch_size": 12 if replicas == 3 else 8, "micro_batch_size": 1, "steps": STEPS}
    answers = pool.run(sharded, stages * replicas, settings(stages, replicas, train=batch, **changes))
    alone = sharded(0, 1, settings(1, 1, train=batch))
    for losses, norms, evaluated, weights, (held, moments, every, tied) in answers:
        assert losses == pytest.approx(alone[0], rel=1e-12)
        assert norms == pytest.approx(alone[1], rel=1e-10)
        assert evaluated == pytest.approx(alone[2], rel=1e-12)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone[3][name], rtol=1e-9, atol=1e-12)
        # Parts differ by what does not divide evenly: at most a row of each matrix.
        assert held <= tied + (every - tied) / replicas * 1.35
        assert moments == 2 * held


def test_a_sharded_run_resumes_to_the_bit_and_into_other_layouts(pool: WorkerPool, tmp_path: Path) -> None:
    made = settings(2, 2)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    uninterrupted = pool.run(resume_job, 4, made, str(tmp_path / "whole"), False, 6, 3)
    first = pool.run(resume_job, 4, made, str(tmp_path / "stopped"), False, 3, 3)
    second = pool.run(resume_job, 4, made, str(tmp_path / "stopped"), True, 6, 6)
    assert [a + b for a, b in zip(first, second, strict=True)] == uninterrupted
    elsewhere = resume_job(0, 1, settings(1, 1), str(tmp_path / "whole"), True, 6, 100)
    assert elsewhere == []  # the newest checkpoint is at step 6
    for entry in (tmp_path / "whole").glob("step_00000006"):
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
    elsewhere = resume_job(0, 1, settings(1, 1), str(tmp_path / "whole"), True, 6, 100)
    assert elsewhere == pytest.approx(uninterrupted[0][3:], rel=1e-10)


def test_a_plain_checkpoint_loads_into_a_sharded_run(pool: WorkerPool, tmp_path: Path) -> None:
    whole_losses = resume_job(0, 1, settings(1, 1), str(tmp_path), False, 6, 3)
    for file in (tmp_path / "step_00000006").iterdir():
        file.unlink()
    (tmp_path / "step_00000006").rmdir()
    for losses in pool.run(resume_job, 2, settings(1, 2), str(tmp_path), True, 6, 100):
        assert losses == pytest.approx(whole_losses[3:], rel=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_parallel": {"replicas": 1, "sharding": "fsdp2"}}, "divides over replicas, of which there is 1"),
        ({"data_parallel": {"sharding": "fsdp2"}}, "1 process with pipe.stages=1 make only 1; start more"),
        ({"data_parallel": {"sharding": "fsdp"}}, "did you mean 'fsdp2'"),
        ({"data_parallel": {"reshard_after_forward": True}}, "no meaning without sharding"),
        (
            {"data_parallel": {"sharding": "fsdp2"}, "local_updates": {"method": "diloco", "period": 2}},
            "replicas train apart.*remove one of the two",
        ),
        (
            {"data_parallel": {"sharding": "fsdp2"}, "compression": {"algorithm": "powersgd"}},
            "compresses whole matrices.*or sharding: none",
        ),
        (
            {"data_parallel": {"sharding": "fsdp2"}, "optimizer": {"name": "onebit_adam", "freeze_step": 2}},
            "exchanges whole momenta",
        ),
    ],
)
def test_what_sharding_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        penstock.initialize(model(), {**config(dropping=False), **changes}, training_data=tokens())


def test_what_needs_parameters_between_passes_or_whole_ones_is_refused() -> None:
    made = {**config(dropping=False), "data_parallel": {"sharding": "fsdp2"}}
    split = {
        **made,
        "pipe": {"stages": 2, "schedule": "zb_h1"},
        "data_parallel": {"sharding": "fsdp2", "reshard_after_forward": True},
    }
    with pytest.raises(ValueError, match="schedule 'zb_h1' computes weight gradients then, which need them"):
        prepare(model(), split, world_size=4)
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="which the given SGD does not hold; give a factory"):
        prepare(plain, made, world_size=2, optimizer=torch.optim.SGD(plain.parameters(), lr=0.1))
