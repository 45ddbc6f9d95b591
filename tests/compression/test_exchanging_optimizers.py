"""What the optimizers that communicate by themselves do on one replica, and what they refuse."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penstock._core.protocols import OwnsExchange
from penstock.compression import ErrorMemory, OneBitAdam, OneBitLamb, ZeroOneAdam
from penstock.compression.rechunk import rechunked

SHAPES = [(17, 5), (), (3,), (64, 33), (1000,), (0,)]
ALL = [OneBitAdam, OneBitLamb, ZeroOneAdam]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def give_gradients(into: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in into:
        scale = 10.0 ** torch.randint(-6, 3, (), generator=generator).item()
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


@settings(max_examples=15)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lr=st.floats(1e-6, 1.0),
    beta1=st.floats(0.0, 0.999),
    beta2=st.floats(0.0, 0.9999),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    bucket_bytes=st.sampled_from([1, 1000, 10**7]),
)
def test_zero_one_adams_first_steps_are_bitwise_adamw(dtype, lr, beta1, beta2, weight_decay, bucket_bytes) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    options: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "weight_decay": weight_decay}
    zero_one = ZeroOneAdam(ours, bucket_bytes=bucket_bytes, var_update_scaler=5, **options)
    adamw = torch.optim.AdamW(theirs, foreach=False, **options)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        zero_one.step()
        adamw.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


class PlainLamb:
    """LAMB tensor by tensor, as You et al. write it, with decay in the update and Adam's corrections."""

    def __init__(self, params: list[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float):
        self.params, self.lr, self.betas, self.decay, self.t = params, lr, betas, weight_decay, 0
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        b1, b2 = self.betas
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            assert p.grad is not None
            m.lerp_(p.grad, 1 - b1)
            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            direction = (m / (v.sqrt() / (1 - b2**self.t) ** 0.5 + 1e-8) / (1 - b1**self.t)).add(p, alpha=self.decay)
            above, below = float(p.norm()), float(direction.norm())
            ratio = min(max(above / below, 0.01), 10.0) if above > 0 and below > 0 else 1.0
            p.add_(direction, alpha=-self.lr * ratio)


@settings(max_examples=15)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lr=st.floats(1e-6, 0.5),
    beta1=st.floats(0.0, 0.999),
    beta2=st.floats(0.0, 0.9999),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    bucket_bytes=st.sampled_from([1, 10**7]),
)
def test_one_bit_lambs_warm_up_is_bitwise_lamb(dtype, lr, beta1, beta2, weight_decay, bucket_bytes) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    options: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "weight_decay": weight_decay}
    one_bit, plain = OneBitLamb(ours, bucket_bytes=bucket_bytes, **options), PlainLamb(theirs, **options)
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one_bit.step()
        plain.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_rounded_from_a_float32_copy(make: Any, dtype: torch.dtype) -> None:
    ours = [nn.Parameter(p.detach().to(dtype)) for p in parameters(torch.float32)]
    full = [nn.Parameter(p.detach().float()) for p in ours]
    half, single = make(ours, lr=1e-4), make(full, lr=1e-4)
    for step in range(20):  # of which each alone would often be rounded away
        give_gradients(ours, step)
        for p, q in zip(full, ours, strict=True):
            p.grad = q.grad.float()  # type: ignore[union-attr]
        half.step()
        single.step()
        for p, q in zip(ours, full, strict=True):
            assert torch.equal(p.detach(), q.detach().to(dtype))
            assert torch.equal(half.state[p]["master"], q.detach())


@pytest.mark.parametrize("make", ALL)
def test_weights_that_are_loaded_later_are_taken_over(make: Any) -> None:
    ours = [nn.Parameter(torch.ones(5, dtype=torch.bfloat16)), nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]
    optimizer = make(ours, lr=1e-4)
    for p in ours:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = optimizer.state[ours[1]]["master"].clone()
    with torch.no_grad():
        ours[0].fill_(3.0)
    for p in ours:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state[ours[0]]["master"].allclose(torch.tensor(3.0), atol=1e-3)
    assert optimizer.state[ours[1]]["master"].allclose(kept, atol=1e-3)  # and not the rounded parameter
    assert not torch.equal(optimizer.state[ours[1]]["master"], ours[1].float())


@pytest.mark.parametrize("make", ALL)
def test_state_goes_through_a_dict_and_a_step_goes_on_from_it(make: Any) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    options |= {"freeze_step": 2} if make is not ZeroOneAdam else {"var_freeze_step": 2, "var_update_scaler": 1}
    first, second = parameters(torch.float32), parameters(torch.float32)
    one, two = make(first, **options), make(second, **options)
    for step in range(5):
        give_gradients(first, step)
        one.step()
    saved = copy.deepcopy(one.state_dict())
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    two.load_state_dict(saved)
    for step in range(5, 8):
        for optimizer, ps in ((one, first), (two, second)):
            give_gradients(ps, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("make", ALL)
def test_each_owns_its_exchange_and_refuses_late_groups_and_infinite_gradients(make: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = make([p])
    assert isinstance(optimizer, OwnsExchange)
    assert optimizer.error_state() == {}
    with pytest.raises(ValueError, match=f"{make.__name__} lays out its buckets when it is made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    p.grad = torch.tensor([1.0, torch.inf, 1.0])
    with pytest.raises(FloatingPointError, match="step 1"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))
    with pytest.raises(ValueError, match="real floating parameters"):
        make([nn.Parameter(torch.ones(3, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (OneBitLamb, {"freeze_step": 0}, "freeze_step must be at least 1"),
        (OneBitLamb, {"coeff_beta": 1.0}, r"coeff_beta must be in \[0, 1\), got 1.0"),
        (OneBitLamb, {"factor_threshold": 1.0}, "factor_threshold must be in"),
        (OneBitLamb, {"factor_min": 5.0}, "factor_min=5.0 and factor_max=4.0"),
        (OneBitLamb, {"min_coeff": 0.0}, "min_coeff=0.0 and max_coeff=10.0"),
        (ZeroOneAdam, {"variance_floor": -0.1}, "variance_floor must be in"),
        (ZeroOneAdam, {"local_step_clipper": 0}, "local_step_clipper must be at least 1"),
        (ZeroOneAdam, {"lr": -1.0}, "lr must not be negative"),
        (ZeroOneAdam, {"betas": (0.9, 1.0)}, "betas must be in"),
    ],
)
def test_wrong_options_are_refused(make: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(3))], **options)


def test_a_layer_without_gradients_moves_under_lamb_only_by_decay() -> None:
    p, q = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))
    optimizer = OneBitLamb([p, q], lr=0.1, freeze_step=2)
    for _ in range(5):
        p.grad = torch.ones(64)
        optimizer.step()
    assert torch.equal(q.detach(), torch.ones(64))
    assert (p < 1).all()


@given(numel=st.integers(1, 600), old=st.integers(1, 5), new=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_rechunked_memories_owe_what_the_old_ones_did(numel: int, old: int, new: int, seed: int) -> None:
    def cut(ranks: int) -> list[tuple[int, int]]:
        size = (numel + ranks - 1) // ranks
        size = (size + 63) // 64 * 64
        return [(min(r * size, numel), min((r + 1) * size, numel)) for r in range(ranks)]

    generator = torch.Generator().manual_seed(seed)
    states = [
        {
            "b.worker": torch.randn(numel, generator=generator, dtype=torch.float64),
            "b.server": torch.randn(stop - start, generator=generator, dtype=torch.float64),
        }
        for start, stop in cut(old)
    ]
    owed = sum(s["b.worker"] for s in states) / old + torch.cat([s["b.server"] for s in states])
    taken = []
    for start, stop in cut(new):
        mine = ErrorMemory(torch.empty(numel), torch.empty(stop - start), chunk_start=start)
        taken.append(rechunked(states, {"b": mine}, replicas=new))
    assert [t["b.server"].numel() for t in taken] == [stop - start for start, stop in cut(new)]
    still = sum(t["b.worker"] for t in taken) / new + torch.cat([t["b.server"] for t in taken])
    torch.testing.assert_close(still, owed, rtol=1e-12, atol=1e-12)


class Keys:
    """A reduction over one replica that keeps the steps that it was started with."""

    def __init__(self) -> None:
        self.seen: list[int | None] = []

    def start(self, step: int | None = None) -> None:
        self.seen.append(step)

    def advance(self) -> bool:
        return False

    def wait(self) -> None:
        pass


def test_a_round_that_is_ended_early_makes_random_choices_of_its_own() -> None:
    p = nn.Parameter(torch.ones(8))
    optimizer = ZeroOneAdam([p], var_freeze_step=1, var_update_scaler=1, local_step_scaler=2, local_step_clipper=2)
    (bucket,) = optimizer._all_buckets()
    keys = bucket._compressed = Keys()
    for _ in range(12):
        p.grad = torch.ones(8)
        optimizer.step()
        optimizer.synchronize()
    assert len(keys.seen) == 11  # all steps but the first
    assert len(set(keys.seen)) == 11
