from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from penstock.compression import OneBitLamb
from support.compression_optimizer_reference import ReferenceLamb
from support.pool import WorkerPool

SIZES = [1920, 8, 1200]  # whole cache lines in float64, so the bucket has no gaps
LAYERS = [np.random.default_rng(i).normal(size=size, scale=0.1**i) for i, size in enumerate(SIZES)]
OPTIONS: dict[str, Any] = {
    "lr": 2e-2,
    "betas": (0.9, 0.99),
    "freeze_step": 12,
    "max_coeff": 10.0,
    "min_coeff": 0.01,
    "coeff_beta": 0.8,
    "factor_max": 1.5,
    "factor_min": 0.6,
    "factor_threshold": 0.05,
}


def gradient(x: np.ndarray[Any, Any], rank: int, step: int) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng([rank, step]).normal(size=len(x))
    return np.linspace(0.1, 2.0, len(x)) * (x - 0.5 * rank) + 0.3 * noise


def train(rank: int, world_size: int, steps: int, options: dict[str, Any]) -> list[torch.Tensor]:
    parameters = [nn.Parameter(torch.from_numpy(x)) for x in (layer.copy() for layer in LAYERS)]
    optimizer = OneBitLamb(parameters, **options)
    history = []
    for step in range(steps):
        flat = torch.cat([p.detach() for p in parameters])
        for p, part in zip(parameters, torch.from_numpy(gradient(flat.numpy(), rank, step)).split(SIZES), strict=True):
            p.grad = part
        assert optimizer.compressing == (step >= options["freeze_step"])
        optimizer.step()
        history.append(torch.cat([p.detach().clone() for p in parameters]))
    return history


@pytest.mark.parametrize(
    ("ranks", "bias_correction", "floor", "decay"), [(2, True, 0.05, 0.1), (3, False, 0.0, 0.0), (2, False, 0.3, 0.02)]
)
def test_it_is_the_papers_algorithm(
    pool: WorkerPool, ranks: int, bias_correction: bool, floor: float, decay: float
) -> None:
    options = {**OPTIONS, "eps": 1e-8 if floor else 1e-3, "weight_decay": decay}
    options |= {"bias_correction": bias_correction, "variance_floor": floor}
    steps = 30
    answers = pool.run(train, ranks, steps, options)
    reference = ReferenceLamb(LAYERS, ranks, **options)
    for step in range(steps):
        flat = np.concatenate(reference.layers)
        reference.step([gradient(flat, rank, step) for rank in range(ranks)])
        tolerance = 1e-10 if step < 12 else 1e-5  # after the freeze a scale's float32 rounding may fall either way
        expected = np.concatenate(reference.layers)
        np.testing.assert_allclose(answers[0][step].numpy(), expected, rtol=tolerance, atol=tolerance)
        for history in answers[1:]:
            assert torch.equal(history[step], answers[0][step])  # replicas never drift
    assert any(abs(r - 1) > 0.02 for r in reference.r)  # the factors were at work


def odd_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 1)).to(dtype)


def backward(model: nn.Module, rank: int, step: int) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 13, generator=torch.Generator().manual_seed(50 * step + rank)).to(dtype)
    model.zero_grad()
    (model(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()


def stop_and_go_on(rank: int, world_size: int, stop: int, dtype: torch.dtype) -> list[bool]:
    def fresh() -> tuple[nn.Module, OneBitLamb]:
        model = odd_model(dtype)
        return model, OneBitLamb(model.parameters(), lr=3e-3, freeze_step=5, bucket_bytes=400)

    model, optimizer = fresh()
    saved: dict[str, Any] = {}
    for step in range(12):
        if step == stop:
            state = optimizer.state_dict()
            saved = {
                "model": {k: v.clone() for k, v in model.state_dict().items()},
                "optimizer": {
                    "state": {i: {k: v.clone() for k, v in s.items()} for i, s in state["state"].items()},
                    "param_groups": state["param_groups"],
                },
                "errors": {k: v.clone() for k, v in optimizer.error_state().items()},
            }
        backward(model, rank, step)
        optimizer.step()
    resumed, other = fresh()
    for step in range(8):
        backward(resumed, rank, step + 100)
        other.step()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    fits = other.load_error_state(saved["errors"])
    for step in range(stop, 12):
        backward(resumed, rank, step)
        other.step()
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    errors = other.error_state()
    scalars = list(optimizer.coefficients().values()) == list(other.coefficients().values())
    equal = [torch.equal(e, errors[k]) for k, e in optimizer.error_state().items()]
    return [fits, same, scalars, all(equal)]


@pytest.mark.parametrize(("stop", "dtype"), [(3, torch.float32), (9, torch.float32), (9, torch.bfloat16)])
def test_a_resumed_run_is_bitwise_the_same(pool: WorkerPool, stop: int, dtype: torch.dtype) -> None:
    assert pool.run(stop_and_go_on, 2, stop, dtype) == [[True] * 4] * 2
