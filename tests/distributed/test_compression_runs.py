"""Compression in whole runs: under a pipeline with tied weights, and over machines."""

from pathlib import Path
from typing import Any

import pytest

from support.pool import WorkerPool
from support.run_jobs import config, resume_job

STEPS, EVERY = 6, 3


@pytest.mark.parametrize(
    ("stages", "replicas", "section"),
    [
        (2, 2, {"algorithm": "powersgd", "min_dimensions": 2}),
        (2, 2, {"algorithm": "int4", "options": {"stochastic": True}, "error_feedback": "ef21"}),
        (1, 4, {"algorithm": "topk_int2", "replicas_per_machine": 2, "full_precision": ["*norm*"], "error_decay": 0.1}),
    ],
)
def test_runs_train_and_resume_bitwise(
    pool: WorkerPool, tmp_path: Path, stages: int, replicas: int, section: dict[str, Any]
) -> None:
    settings = config(stages=stages, replicas=replicas, precision="float32", steps=STEPS, compression=section)
    ranks = pool.run(resume_job, 4, settings, str(tmp_path), False, STEPS, EVERY, deadline_s=90)
    assert all(losses == ranks[0] for losses in ranks)
    assert ranks[0][-1] < ranks[0][0]
    for complete in tmp_path.glob("step_*"):
        if int(complete.name.removeprefix("step_")) == STEPS:
            for file in sorted(complete.rglob("*")):
                file.unlink()
            complete.rmdir()
    again = pool.run(resume_job, 4, settings, str(tmp_path), True, STEPS, EVERY, deadline_s=90)[0]
    assert again == ranks[0][EVERY:]
