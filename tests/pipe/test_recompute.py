"""Recomputation: once for any number of calls of autograd, exact, let go, and honest about layers that differ."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.pipe.recompute import RecomputationError, checkpointed, is_recomputing
from penstock.pipe.split_backward import SplitBackward


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
        self.calls: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(is_recomputing())
        return self.layers(x)


def test_a_split_backward_pass_recomputes_once_and_equals_a_plain_one() -> None:
    layer = Counting()
    x = torch.randn(2, 3, requires_grad=True)
    layer(x).sum().backward()
    expected = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    layer.calls.clear()
    output = checkpointed(layer, x)
    splitting = SplitBackward()
    (gradient,), work = splitting.input_half([output], [torch.ones_like(output)], [x], None)
    assert layer.calls == [False, True]
    work.run()
    assert layer.calls == [False, True]
    assert not splitting.reasons
    for found, wanted in zip([gradient, *(p.grad for p in layer.parameters())], expected, strict=True):
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)


def test_nothing_is_kept_but_the_input_and_what_was_recomputed_goes_with_the_backward_pass() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def run(x: Tensor) -> Tensor:
        hidden = x * 2
        seen.append(weakref.ref(hidden.untyped_storage()))  # type: ignore[arg-type]
        return hidden.exp().sin()

    x = torch.ones(3, requires_grad=True)
    output = checkpointed(run, x)
    assert seen[0]() is None
    output.sum().backward()
    assert len(seen) == 2
    assert seen[1]() is None
    torch.testing.assert_close(x.grad, 2 * torch.e**2 * torch.cos(torch.exp(2 * torch.ones(3))))


def test_the_last_product_is_not_computed_again() -> None:
    """What no gradient needs is the end of a group: its output."""
    done: list[str] = []

    def run(x: Tensor) -> Tensor:
        done.append("start")
        y = x.exp() + 1
        done.append("end")
        return y

    checkpointed(run, torch.ones(2, requires_grad=True)).sum().backward()
    assert done == ["start", "end", "start"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda x: x.sum() * x.new_ones(3), "saved tensor 0 is"),
        (lambda x: x + 1, "it saved 0 tensors, the first time 2"),
    ],
)
def test_layers_that_do_something_else_are_refused(second: Any, message: str) -> None:
    def run(x: Tensor) -> Tensor:
        return second(x) if is_recomputing() else x.double().exp().float().sin()

    output = checkpointed(run, torch.ones(3, requires_grad=True))
    with pytest.raises(RecomputationError, match=message):
        output.sum().backward()


def test_groups_may_lie_within_one_another() -> None:
    inner, outer = Counting(), Counting()
    x = torch.randn(2, 3, requires_grad=True)
    expected = torch.autograd.grad(outer(inner(x)).sum(), x)[0]
    output = checkpointed(lambda v: outer(checkpointed(inner, v)), x)
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)
