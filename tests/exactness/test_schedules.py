"""Every schedule gives the single-process run: several stages per rank, split backward passes, checkpoints between."""

from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.pipe.schedule import SCHEDULES, get_schedule, save_schedule
from support.pool import WorkerPool
from support.run_jobs import config, job, resume_job, train

STEPS = 4
OPTIMIZER = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "gradient_clipping": 0.5}
RUNNABLE = [name for name, known in SCHEDULES.items() if known.trains and not known.sliced]


def settings(schedule: str, stages: int = 2, replicas: int = 1, **pipe: Any) -> dict[str, Any]:
    result = config(stages=stages, replicas=replicas, schedule=schedule, steps=STEPS)
    result["optimizer"] = OPTIMIZER
    result["pipe"] |= pipe
    return result


@pytest.fixture(scope="module")
def single() -> Any:
    return train(settings("1f1b", stages=1), STEPS)


def check(ranks: list[Any], single: Any) -> None:
    losses, gradients, weights = single
    for rank_losses, _, _ in ranks:
        assert rank_losses == pytest.approx(losses, rel=1e-10)
    for step in range(STEPS):
        seen = set()
        for _, rank_gradients, _ in ranks:
            for name, gradient in rank_gradients[step].items():
                torch.testing.assert_close(gradient, gradients[step][name], rtol=1e-8, atol=1e-12)
                seen.add(name)
        assert seen == set(gradients[step])
    for _, _, local in ranks:
        for name, weight in local.items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("schedule", RUNNABLE)
def test_every_schedule_equals_the_single_process_run(pool: WorkerPool, single: Any, schedule: str) -> None:
    check(pool.run(job, 2, settings(schedule), STEPS), single)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zb_v"])
def test_with_recomputed_activations(pool: WorkerPool, single: Any, schedule: str) -> None:
    check(pool.run(job, 2, settings(schedule, activation_checkpoint_interval=1), STEPS), single)


@pytest.mark.parametrize("schedule", ["zb_h1", "dualpipe_v"])
def test_with_replicas(pool: WorkerPool, single: Any, schedule: str) -> None:
    check(pool.run(job, 4, settings(schedule, replicas=2), STEPS), single)


def test_three_stages_per_rank_and_bounds_of_ones_own(pool: WorkerPool, single: Any) -> None:
    check(pool.run(job, 2, settings("looped_bfs", chunks=3), STEPS), single)
    check(pool.run(job, 2, settings("zb_v", partition_method=[0, 1, 3, 4, 7]), STEPS), single)


def test_a_schedule_from_a_file(pool: WorkerPool, single: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    save_schedule(get_schedule("v_half", 2, 8), path)
    check(pool.run(job, 2, settings(str(path)), STEPS), single)


def test_a_checkpoint_of_several_stages_per_rank_goes_on_anywhere(pool: WorkerPool, tmp_path: Path) -> None:
    """On its own layout bit for bit; on one process and back with the same weights."""
    run = settings("zb_v")
    for name in ("whole", "parts", "same", "one"):
        (tmp_path / name).mkdir()
    whole = pool.run(resume_job, 2, run, str(tmp_path / "whole"), False, STEPS, STEPS)[0]
    folder = tmp_path / "parts"
    first = pool.run(resume_job, 2, run, str(folder), False, 2, 2)[0]
    (folder / "step_00000002").rename(tmp_path / "start")
    for name, other, processes in (("same", run, 2), ("one", settings("1f1b", stages=1), 1)):
        (tmp_path / name / "step_00000002").symlink_to(tmp_path / "start")
        rest = pool.run(resume_job, processes, other, str(tmp_path / name), True, STEPS, STEPS)[0]
        if name == "same":
            assert first + rest == whole
        assert first + rest == pytest.approx(whole, rel=1e-10)
