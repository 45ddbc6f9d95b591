"""Replicas under ``torch.amp.GradScaler``, of which one overflows.

Scales are powers of two, so bits can be compared.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from penstock.compression import DeMo, DiLoCo, OneBitAdam, OneBitLamb, ZeroOneAdam
from support.pool import WorkerPool

OVERFLOWS = 4


def make(name: str, parameters: list[nn.Parameter]) -> Optimizer:
    exchanging: dict[str, Any] = {
        "adam": lambda: OneBitAdam(parameters, lr=1e-2, freeze_step=2),
        "lamb": lambda: OneBitLamb(parameters, lr=1e-2, freeze_step=2),
        "demo": lambda: DeMo(parameters, lr=1e-2),
        "zero_one": lambda: ZeroOneAdam(
            parameters, lr=1e-2, var_freeze_step=2, local_step_scaler=1, local_step_clipper=4
        ),
        "sgd": lambda: SGD(parameters, lr=1e-2, momentum=0.9),
        "adamw": lambda: AdamW(parameters, lr=1e-2, fused=True),
    }
    made: Optimizer = exchanging[name]()
    return made


def train(rank: int, name: str, local: bool, scaled: bool) -> tuple[Tensor, list[bool]]:
    """Parameters after 8 steps, and in which of them they moved; in the fourth rank 0 overflows.

    Without a scaler that step is left out: by all replicas where they exchange in it, else by rank 0 alone.
    """
    parameter = nn.Parameter(torch.linspace(-1, 1, 300))
    optimizer = make(name, [parameter])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    outer = DiLoCo(optimizer, period=2, algorithm="int8").attach() if local else None
    moved = []
    for step in range(8):
        wanted = torch.randn(300, generator=torch.Generator().manual_seed(10 * step + rank))
        overflows = step == OVERFLOWS and rank == 0
        before = parameter.detach().clone()
        optimizer.zero_grad()
        scaler.scale((parameter * wanted).sum() * (torch.inf if overflows and scaled else 1.0)).backward()
        if not scaled and step == OVERFLOWS and (rank == 0 or not local):
            optimizer.zero_grad()
            if not local:
                moved.append(False)
                continue
        if step == 2:
            scaler.unscale_(optimizer)  # to clip, for example
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, parameter))
    if outer is not None:
        assert outer.step == 8
        outer.detach()
    if isinstance(optimizer, ZeroOneAdam):
        optimizer.synchronize()
    return parameter.detach(), moved


def with_and_without(rank: int, world_size: int, names: list[tuple[str, bool]]) -> list[Any]:
    return [(train(rank, *name, scaled=True), train(rank, *name, scaled=False)) for name in names]


def test_replicas_stay_together_when_one_overflows(pool: WorkerPool) -> None:
    exchanging = [(name, False) for name in ("adam", "lamb", "demo", "zero_one")]
    local = [("sgd", True), ("adamw", True)]
    answers = pool.run(with_and_without, 2, exchanging + local, deadline_s=60)
    for one, other in zip(*answers, strict=True):
        for (scaled, moved), (expected, also) in (one, other):
            assert torch.equal(scaled, expected)
            assert moved == also
            assert any(moved)
        assert torch.equal(one[0][0], other[0][0])
    for name, ((_, moved), _) in zip(exchanging, answers[1], strict=False):
        assert not moved[OVERFLOWS], name  # nor does the rank that did not overflow
        assert sum(moved) == 7


def test_a_scale_is_not_taken_off_gradients_in_half_precision() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with DiLoCo(optimizer, period=2, replicas=1):
        scaler.scale(parameter.float().sum()).backward()
        with pytest.raises(ValueError, match="cannot take its scale off gradients in float16"):
            scaler.step(optimizer)
