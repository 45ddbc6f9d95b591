"""A run that was killed and resumed is the run that was not, bit for bit."""

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.runtime.checkpoint import Checkpoint
from support.pool import WorkerPool, run_fresh
from support.run_jobs import config, resume_job

STEPS, EVERY = 16, 3


def read_losses(folder: Path, rank: int) -> dict[int, str]:
    """The last loss written for each step."""
    lines = (folder / f"losses_{rank}.txt").read_text().splitlines()
    return {int(step): loss for step, loss in (line.split() for line in lines)}


@pytest.fixture(scope="module")
def uninterrupted(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("whole")
    settings = config(stages=2, replicas=2, precision="float32", steps=STEPS, optimizer="onebit_adam")
    ranks = pool.run(resume_job, 4, settings, str(folder), False, STEPS, EVERY, deadline_s=100)
    assert all(losses == ranks[0] for losses in ranks)
    return list(ranks[0])


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("victim", "after", "delay"), [(0, 4, 0.0), (3, 9, 0.013), (1, 3, 0.004), (2, 12, 0.03)])
def test_killed_and_resumed_with_one_bit_adam(
    uninterrupted: list[float], pool: WorkerPool, tmp_path: Path, victim: int, after: int, delay: float
) -> None:
    # The kill lands a moment after some step: in the middle of the next step, or of a checkpoint. Whatever was written
    # at each step must be right in every case.
    settings = config(stages=2, replicas=2, precision="float32", steps=STEPS, optimizer="onebit_adam", deadline_s=5)
    written_by_victim = tmp_path / f"losses_{victim}.txt"

    def now() -> bool:
        if not written_by_victim.exists() or len(written_by_victim.read_text().splitlines()) < after:
            return False
        time.sleep(delay)
        return True

    ended = run_fresh(resume_job, 4, settings, str(tmp_path), False, STEPS, EVERY, kill={victim: now}, deadline_s=90)
    assert ended[victim].code == -9
    assert all(end.code != 0 for end in ended)
    complete = sorted(path.name for path in tmp_path.glob("step_????????"))
    losses = pool.run(resume_job, 4, settings, str(tmp_path), bool(complete), STEPS, EVERY, deadline_s=90)[0]
    start = STEPS - len(losses)
    assert losses == uninterrupted[start:]
    for rank in range(4):
        written = read_losses(tmp_path, rank)
        assert written == {step + 1: loss.hex() for step, loss in enumerate(uninterrupted)}


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(1, STEPS - 1))
def test_stopped_at_any_step_and_resumed(
    uninterrupted: list[float], pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory, stop: int
) -> None:
    folder = str(tmp_path_factory.mktemp("stopped"))
    run = config(stages=2, replicas=2, precision="float32", steps=STEPS, optimizer="onebit_adam")
    first = pool.run(resume_job, 4, run, folder, False, stop, stop, deadline_s=90)[0]
    second = pool.run(resume_job, 4, run, folder, True, STEPS, STEPS, deadline_s=90)[0]
    assert first + second == uninterrupted


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (4, 1), (1, 2)])
def test_another_layout_goes_on_from_the_same_weights(
    pool: WorkerPool, tmp_path: Path, stages: int, replicas: int
) -> None:
    layout = {"precision": "float64", "steps": STEPS}
    settings = config(stages=2, replicas=2, **layout)
    whole = pool.run(resume_job, 4, settings, str(tmp_path), False, STEPS, 8, deadline_s=90)[0]
    (tmp_path / f"step_{STEPS:08d}").rename(tmp_path / "last")
    other = config(stages=stages, replicas=replicas, **layout)
    losses = pool.run(resume_job, stages * replicas, other, str(tmp_path), True, STEPS, STEPS, deadline_s=90)[0]
    assert losses == pytest.approx(whole[8:], rel=1e-10)


def test_another_layout_continues_the_reducers_warm_up_and_starts_with_empty_memories(
    pool: WorkerPool, tmp_path: Path
) -> None:
    changes = {"compression": {"algorithm": "onebit", "warmup_steps": 6}}
    run = config(stages=2, replicas=2, precision="float64", steps=STEPS, **changes)
    pool.run(resume_job, 4, run, str(tmp_path), False, 8, 8, deadline_s=90)
    other = config(stages=1, replicas=2, precision="float64", steps=STEPS, **changes)
    for losses in pool.run(resume_job, 2, other, str(tmp_path), True, STEPS, STEPS, deadline_s=90):
        assert len(losses) == STEPS - 8
    state = Checkpoint(tmp_path / f"step_{STEPS:08d}").read_state()
    assert [rank["plain"]["exchange.step"] for rank in state["ranks"]] == [STEPS, STEPS]
    assert state["progress"]["earlier"]["spent"]["steps"] == 8
