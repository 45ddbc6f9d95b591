"""A split run is the single-process run: losses and gradients, for every layout and schedule."""

from typing import Any

import pytest
import torch

from support.pool import WorkerPool
from support.run_jobs import config, job, train

STEPS = 20
LAYOUTS = [(2, 1), (4, 1), (1, 2), (2, 2)]
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(scope="module", params=["float32", "float64"])
def single(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, train(config(precision=request.param, steps=STEPS), STEPS)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "replicas"), LAYOUTS)
def test_a_split_run_equals_the_single_process_run(
    pool: WorkerPool, single: tuple[str, Any], stages: int, replicas: int, schedule: str
) -> None:
    precision, (losses, gradients, _) = single
    settings = config(stages=stages, replicas=replicas, schedule=schedule, precision=precision, steps=STEPS)
    ranks = pool.run(job, stages * replicas, settings, STEPS, deadline_s=100)
    tolerance = TOLERANCE[precision]
    for rank_losses, _, _ in ranks:
        assert rank_losses == ranks[0][0]
        assert rank_losses == pytest.approx(losses, rel=tolerance)
    for step in range(STEPS):
        seen = set()
        for _, rank_gradients, _ in ranks:
            for name, gradient in rank_gradients[step].items():
                expected = gradients[step][name]
                error = torch.linalg.vector_norm((gradient - expected).double())
                assert error <= tolerance * torch.linalg.vector_norm(expected.double()), (step, name)
                seen.add(name)
        assert seen == set(gradients[step])


def test_the_run_learns_so_there_is_something_to_compare(single: tuple[str, Any]) -> None:
    _, (losses, gradients, _) = single
    assert sum(losses[-5:]) / 5 < losses[0] - 0.05
    assert all(torch.linalg.vector_norm(g) > 0 for g in gradients[-1].values())


@pytest.mark.parametrize("optimizer", ["adamw", "onebit_adam"])
def test_two_runs_on_one_layout_are_the_same_bits(pool: WorkerPool, optimizer: str) -> None:
    settings = config(stages=2, replicas=2, precision="float32", steps=STEPS, optimizer=optimizer)
    first, second = (pool.run(job, 4, settings, STEPS, deadline_s=100) for _ in range(2))
    for (losses, gradients, weights), (losses2, gradients2, weights2) in zip(first, second, strict=True):
        assert losses == losses2
        for mine, theirs in zip([*gradients, weights], [*gradients2, weights2], strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
