"""Local updates on one replica, their schedule, and what they refuse."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penstock.compression import (
    DiLoCo,
    LocalSGD,
    LocalUpdates,
    MuLoCo,
    MuonAdamW,
    OneBitAdam,
    OuterStep,
    SparseLoCo,
    StreamingDiLoCo,
)
from penstock.compression.local.fragment_schedule import FragmentSchedule


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 1)).to(dtype)


def backward(net: nn.Module, step: int) -> None:
    dtype = next(net.parameters()).dtype
    x = torch.randn(16, 13, generator=torch.Generator().manual_seed(step)).to(dtype)
    net.zero_grad()
    (net(x) - x.sum(1, keepdim=True)).square().mean().backward()


@given(period=st.integers(1, 40), fragments=st.integers(1, 12), overlap=st.integers(0, 39))
def test_every_fragment_has_its_turn_once_in_a_period(period: int, fragments: int, overlap: int) -> None:
    if fragments > period or overlap >= period:
        with pytest.raises(ValueError, match=r"fragments must be between|overlap="):
            FragmentSchedule(period, fragments, overlap)
        return
    schedule = FragmentSchedule(period, fragments, overlap)
    assert schedule.sent_after(0) is None
    sent = [schedule.sent_after(step) for step in range(1, 3 * period + 1)]
    for start in range(2 * period):
        turns = [fragment for fragment in sent[start : start + period] if fragment is not None]
        assert sorted(turns) == list(range(fragments))
    if fragments > 1:  # and they are spread out
        steps = [step for step, fragment in enumerate(sent) if fragment is not None]
        gaps = [after - before for before, after in pairwise(steps)]
        assert max(gaps) - min(gaps) <= 1


def test_on_one_replica_averaging_is_the_inner_optimizer_bit_for_bit() -> None:
    ours, theirs = model(), model()
    inner, plain = (torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (ours, theirs))
    with LocalSGD(inner, period=3, algorithm="onebit"):
        for step in range(10):
            backward(ours, step)
            inner.step()
            backward(theirs, step)
            plain.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, True)])
def test_the_outer_step_is_torchs_sgd(momentum: float, nesterov: bool) -> None:
    ours, theirs = model(torch.float64), model(torch.float64)
    inner, plain = (torch.optim.SGD(net.parameters(), lr=1e-2) for net in (ours, theirs))
    anchors = [nn.Parameter(p.detach().clone()) for p in theirs.parameters()]
    outer = torch.optim.SGD(anchors, lr=0.7, momentum=momentum, nesterov=nesterov and momentum > 0)
    with DiLoCo(inner, period=4, outer_lr=0.7, outer_momentum=momentum, nesterov=nesterov):
        for step in range(12):
            backward(ours, step)
            inner.step()
            backward(theirs, step)
            plain.step()
            if step % 4 == 3:
                for anchor, p in zip(anchors, theirs.parameters(), strict=True):
                    anchor.grad = anchor.detach() - p.detach()
                outer.step()
                with torch.no_grad():
                    for anchor, p in zip(anchors, theirs.parameters(), strict=True):
                        p.copy_(anchor)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_the_context_ends_with_the_with_block() -> None:
    net = model()
    inner = torch.optim.SGD(net.parameters(), lr=1e-2)
    with DiLoCo(inner, period=2) as local:
        backward(net, 0)
        inner.step()
    backward(net, 1)
    inner.step()
    assert local.step == 1
    with local:
        backward(net, 2)
        inner.step()
    assert local.step == 2


def test_anchors_are_what_the_parameters_were_at_the_first_step() -> None:
    net = model()
    inner = torch.optim.SGD(net.parameters(), lr=1e-2)
    local = DiLoCo(inner, period=2)
    with torch.no_grad():  # a checkpoint is loaded in between, say
        for p in net.parameters():
            p.add_(1.0)
    first = [p.detach().clone() for p in net.parameters()]
    with local.common_weights():
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), first, strict=True))
    with local:
        backward(net, 0)
        inner.step()
    with local.common_weights():
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), first, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(net.parameters(), first, strict=True))
    assert {id(p) for p in local.common_state()} == {id(p) for p in net.parameters()}
    assert all(state.keys() == {"anchor", "outer_momentum"} for state in local.common_state().values())


def test_a_frozen_parameter_stays() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    kept = net[0].weight.detach().clone()
    inner = torch.optim.SGD(net.parameters(), lr=1e-2)
    with StreamingDiLoCo(inner, period=4, fragments=2):
        for step in range(9):
            backward(net, step)
            inner.step()
    assert torch.equal(net[0].weight, kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "period must be at least 1 step, got 0"),
        ({"overlap": 4}, "overlap=4 must be at least 0 and less than period=4"),
        ({"fragments": 5}, "fragments must be between 1 and period=4, got 5"),
        ({"mixing": 1.0}, r"mixing must be in \[0, 1\), got 1.0"),
        ({"error_decay": 0.0}, r"error_decay must be in \(0, 1\], got 0.0"),
        ({"outer_lr": 0.0}, "outer_lr must be positive, got 0.0"),
        ({"outer_momentum": 1.0}, r"outer_momentum must be in \[0, 1\), got 1.0"),
        ({"algorithm": "onebyte"}, "onebit"),
        ({"bucket_bytes": 0}, "bucket_bytes must be positive"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiLoCo(torch.optim.SGD(model().parameters(), lr=0.1), **{"period": 4, **options})


def test_wrong_optimizers_and_fragments_are_refused() -> None:
    net = model()
    with pytest.raises(ValueError, match="OneBitAdam exchanges at every step itself"):
        LocalSGD(OneBitAdam(net.parameters()), period=4)
    with pytest.raises(ValueError, match="Muon inside, but the optimizer is AdamW; take MuonAdamW, or DiLoCo"):
        MuLoCo(torch.optim.AdamW(net.parameters()), period=4, algorithm="onebit")
    inner = torch.optim.AdamW(net.parameters())
    first, *rest = net.parameters()
    for parts in ([[first], rest[1:]], [[first], [first, *rest]], [[first], [*rest, nn.Parameter(torch.ones(1))]]):
        with pytest.raises(ValueError, match="put each of the optimizer's parameters into one fragment"):
            StreamingDiLoCo(inner, period=4, fragments=parts)
    StreamingDiLoCo(inner, period=4, fragments=[[first, *rest], []])  # a stage may have no part in a fragment


def test_a_state_of_other_buckets_is_refused() -> None:
    inner = torch.optim.AdamW(model().parameters())
    saved = copy.deepcopy(DiLoCo(inner, period=4).state_dict())
    with pytest.raises(ValueError, match="the saved anchor of bucket 0 does not fit"):
        DiLoCo(inner, period=4, bucket_bytes=8).load_state_dict(saved)
    with pytest.raises(ValueError, match="the saved outer_momentum of bucket 0 does not fit"):
        LocalUpdates(inner, 4, outer=OuterStep(0.7)).load_state_dict(saved)


def test_muon_and_adamw_are_torchs() -> None:
    ours, theirs = model(), model()
    both = MuonAdamW(ours.parameters(), lr=1e-2, weight_decay=0.1)
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    vectors = [p for p in theirs.parameters() if p.dim() != 2]
    adamw = torch.optim.AdamW(vectors, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(3):
        backward(ours, step)
        both.step()
        backward(theirs, step)
        muon.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    resumed = model()
    resumed.load_state_dict(ours.state_dict())
    again = MuonAdamW(resumed.parameters(), lr=0.5)
    again.load_state_dict(copy.deepcopy(both.state_dict()))
    for net, optimizer in ((ours, both), (resumed, again)):
        backward(net, 3)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), resumed.parameters(), strict=True))


def test_muon_takes_what_is_marked() -> None:
    net = model()
    groups = [{"params": [net[0].weight], "muon": False, "lr": 0.5}, {"params": [net[0].bias, *net[2].parameters()]}]
    optimizer = MuonAdamW(groups, lr=0.1)
    kinds = {id(p): group["muon"] for group in optimizer.param_groups for p in group["params"]}
    assert [kinds[id(p)] for p in net.parameters()] == [False, False, True, False]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1, 0.1]
    backward(net, 0)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[net[2].weight]
    assert "exp_avg" in optimizer.state[net[0].weight]
    with pytest.raises(ValueError, match=r"a group marked muon holds parameters of shape \[\(37,\)\]"):
        MuonAdamW([{"params": [net[0].bias], "muon": True}])


@pytest.mark.parametrize("method", [DiLoCo, LocalSGD, SparseLoCo, StreamingDiLoCo])
def test_each_method_learns_alone(method: Any) -> None:
    net = model()
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with method(inner, period=4, algorithm="onebit"):
        for step in range(60):
            backward(net, step)
            inner.step()
    x = torch.randn(1000, 13, generator=torch.Generator().manual_seed(999))
    assert float((net(x) - x.sum(1, keepdim=True)).detach().square().mean()) < 8.0  # of a variance of 13


def test_parameters_in_half_precision_move_by_gradients_alone() -> None:
    """One gradient, then nothing but outer momentum: what rounding changed is no way that was gone."""
    anchors = []
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.linspace(0.5, 1.5, 256).bfloat16().to(dtype))
        optimizer = torch.optim.SGD([parameter], lr=1 / 64)
        with DiLoCo(optimizer, period=1, replicas=1) as local:
            for step in range(60):
                parameter.grad = torch.full_like(parameter, float(step == 0))
                optimizer.step()
            anchors.append(local.common_state()[parameter]["anchor"].clone())
    exact, rounded = anchors
    assert (exact - torch.linspace(0.5, 1.5, 256)).abs().min() > 0.05
    assert (exact - rounded).abs().max() < 2.0**-7  # a unit in the last place of bfloat16 at 1
