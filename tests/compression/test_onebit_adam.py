import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penstock._core.protocols import OwnsExchange
from penstock.compression import OneBitAdam, OneBitLamb

SHAPES = [(17, 5), (), (3,), (64, 33), (1000,), (0,)]


def parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def give_gradients(into: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in into:
        scale = 10.0 ** torch.randint(-6, 3, (), generator=generator).item()
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


@settings(max_examples=30)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lr=st.floats(1e-6, 1.0),
    beta1=st.floats(0.0, 0.999),
    beta2=st.floats(0.0, 0.9999),
    eps=st.sampled_from([0.0, 1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    bucket_bytes=st.sampled_from([1, 1000, 10**7]),
)
def test_warm_up_is_bitwise_adamw(dtype, lr, beta1, beta2, eps, weight_decay, bucket_bytes) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    options: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    one_bit = OneBitAdam(ours, bucket_bytes=bucket_bytes, **options)
    adamw = torch.optim.AdamW(theirs, foreach=False, **options)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one_bit.step()
        adamw.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
    for p, q in zip(ours, theirs, strict=True):
        state = dict(one_bit.state[p])
        assert state.pop("variance_step") == state["step"] == 5
        assert state.keys() == adamw.state[q].keys()
        assert all(torch.equal(state[k], adamw.state[q][k]) for k in state)


def test_it_takes_over_from_adamw() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    adamw = torch.optim.AdamW(theirs, lr=1e-3, foreach=False)
    for step in range(3):
        give_gradients(theirs, step)
        adamw.step()
    one_bit = OneBitAdam(ours, lr=0.5)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    one_bit.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for step in range(3, 6):
        for optimizer, ps in ((one_bit, ours), (adamw, theirs)):
            give_gradients(ps, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_adams_variance_from_beyond_the_freeze_is_refused() -> None:
    ps = parameters(torch.float32)
    adamw = torch.optim.AdamW(ps, lr=1e-3)
    for step in range(5):
        give_gradients(ps, step)
        adamw.step()
    with pytest.raises(ValueError, match=r"Adam's after 5 steps, but freeze_step=4 .* freeze_step=5 \(to"):
        OneBitAdam(ps, freeze_step=4).load_state_dict(adamw.state_dict())
    one_bit = OneBitAdam(ps, freeze_step=5)
    one_bit.load_state_dict(adamw.state_dict())
    assert one_bit.compressing
    again = OneBitAdam(ps, freeze_step=4)
    give_gradients(ps, 5)
    one_bit.step()
    with pytest.raises(
        ValueError, match=r"of 6 steps with a variance of the first 5, but freeze_step=4.*freeze_step=5"
    ):
        again.load_state_dict(one_bit.state_dict())


@pytest.mark.parametrize("kind", [OneBitAdam, OneBitLamb])
def test_a_variance_of_other_steps_is_refused(kind: type[OneBitAdam | OneBitLamb]) -> None:
    ps = parameters(torch.float32)
    made = kind(ps, freeze_step=3)
    states = []
    for step in range(5):
        give_gradients(ps, step)
        made.step()
        states.append(copy.deepcopy(made.state_dict()))
    for frozen in (2, 4):
        with pytest.raises(ValueError, match=rf"of 5 steps .* first 3, but freeze_step={frozen} .*freeze_step=3 as"):
            kind(ps, freeze_step=frozen).load_state_dict(states[-1])
    later = kind(ps, freeze_step=4)
    later.load_state_dict(states[2])  # 3 steps, all of which the variance is of
    give_gradients(ps, 3)
    later.step()
    assert {int(state["variance_step"]) for state in later.state_dict()["state"].values()} == {4}


def test_a_loaded_state_is_copied_into_the_flat_buffers() -> None:
    ps = parameters(torch.float32)
    optimizer = OneBitAdam(ps, freeze_step=2)
    where = [(s["exp_avg"].data_ptr(), s["exp_avg_sq"].data_ptr()) for s in optimizer.state.values()]
    saved = copy.deepcopy(optimizer.state_dict())
    give_gradients(ps, 0)
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert where == [(s["exp_avg"].data_ptr(), s["exp_avg_sq"].data_ptr()) for s in optimizer.state.values()]
    assert all(s["step"] == 0 and not s["exp_avg"].any() for s in optimizer.state.values())
    assert all(p.data_ptr() % 64 == 0 for s in optimizer.state.values() for p in (s["exp_avg"],) if p.numel())


def test_the_variance_freezes_and_follows_a_later_load() -> None:
    p = nn.Parameter(torch.zeros(64, dtype=torch.float64))
    optimizer = OneBitAdam([p], lr=1.0, freeze_step=1, betas=(0.0, 0.5), eps=0.0, bias_correction=False)
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()  # v = 0.5 * 4
    frozen = optimizer.state[p]["exp_avg_sq"].clone()
    p.grad = torch.full_like(p, 6.0)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], frozen)
    torch.testing.assert_close(before - p.detach(), torch.full_like(p, 6.0 / 2.0**0.5))
    optimizer.state[p]["exp_avg_sq"].fill_(9.0)  # as a checkpoint that is read in place does
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - p.detach(), torch.full_like(p, 2.0))


def test_the_floor_bounds_what_a_tiny_variance_can_do() -> None:
    p = nn.Parameter(torch.zeros(1024, dtype=torch.float64))
    moved = {}
    for floor in (0.0, 0.05):
        with torch.no_grad():
            p.zero_()
        optimizer = OneBitAdam([p], lr=1.0, freeze_step=1, betas=(0.5, 0.5), eps=1e-30, variance_floor=floor)
        p.grad = torch.ones_like(p)
        p.grad[0], p.grad[1] = 1e-12, 0.0
        optimizer.step()
        start = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        moved[floor] = (start - p.detach()).tolist()
    # After two steps of corrected momentum: m = 2/3 for the two quiet elements, 1 for the others.
    assert moved[0.0][0] == pytest.approx(2 / 3 / 1e-12)
    assert moved[0.0][1] == 0.0  # no variance at all: it stays
    assert moved[0.05][:2] == pytest.approx([2 / 3 / (0.05 * 1022 / 1024)] * 2)
    assert moved[0.05][2:] == pytest.approx([1.0] * 1022)


def test_an_element_without_any_variance_only_decays() -> None:
    p = nn.Parameter(torch.ones(10))
    optimizer = OneBitAdam([p], lr=0.1, freeze_step=1, weight_decay=0.5)
    optimizer.step()  # no gradient
    p.grad = torch.ones(10)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((10,), 0.95**2))


def test_a_frozen_parameter_is_left_alone_until_it_is_thawed() -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False)
    optimizer = OneBitAdam([p, q], lr=0.1, weight_decay=0.5)
    p.grad = torch.ones(4)
    optimizer.step()
    assert (p < 1).all()
    assert torch.equal(q, torch.ones(4))
    q.requires_grad_(True)
    p.grad = q.grad = torch.ones(4)
    optimizer.step()
    assert (q < 1).all()


def test_the_rate_of_each_group_can_be_scheduled() -> None:
    a, b = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    optimizer = OneBitAdam([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1, freeze_step=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    for _ in range(2):
        a.grad, b.grad = torch.ones(5), torch.ones(5)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(a.detach(), torch.full((5,), -0.15))
    torch.testing.assert_close(b.detach(), torch.full((5,), -0.75))


def test_a_closure_is_evaluated_with_gradients() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = OneBitAdam([p], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


def test_it_owns_the_exchange() -> None:
    optimizer = OneBitAdam([nn.Parameter(torch.ones(3))])
    assert isinstance(optimizer, OwnsExchange)
    assert optimizer.owns_exchange
    assert optimizer.error_state() == {}
    assert optimizer.load_error_state({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"eps": -1e-8}, "eps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\), got \(1.0, 0.9\)"),
        ({"freeze_step": 0}, "freeze_step must be at least 1"),
        ({"variance_floor": 1.5}, r"variance_floor must be in \[0, 1\], got 1.5"),
        ({"bucket_bytes": 0}, "bucket_bytes must be positive"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneBitAdam([nn.Parameter(torch.ones(3))], **options)


def test_wrong_parameters_and_states_are_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"real floating parameters, got torch.complex64"):
        OneBitAdam([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    optimizer = OneBitAdam([p])
    with pytest.raises(ValueError, match="pass all parameter groups to the constructor"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    other = OneBitAdam([nn.Parameter(torch.ones(4))]).state_dict()
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(4,\), the parameter \(3,\)"):
        optimizer.load_state_dict(other)
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="sparse gradient"):
        optimizer.step()
    two = OneBitAdam(parameters(torch.float32))
    saved = copy.deepcopy(two.state_dict())
    saved["state"][1]["step"] += 1
    with pytest.raises(ValueError, match=r"counts one step .* \[0.0, 1.0\]"):
        two.load_state_dict(saved)


def test_a_nan_raises_before_anything_changes() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = OneBitAdam([p])
    p.grad = torch.tensor([1.0, torch.nan, 1.0])
    with pytest.raises(FloatingPointError, match="step 1"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))
    assert optimizer.state[p]["step"] == 0
    assert not optimizer.state[p]["exp_avg"].any()


def test_a_group_without_parameters_is_allowed_as_in_torch() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = OneBitAdam([{"params": []}, {"params": [parameter]}], lr=0.1, freeze_step=1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.compressing
    assert parameter.tolist() == pytest.approx([0.9] * 3)
