"""Gather, layer and scatter as one unit: against plain indexing, compiled, and in expectation."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from penstock.data_pipeline.random_ltd import gpt_sample_tokens
from penstock.data_pipeline.random_ltd.kernels import cpu
from penstock.data_pipeline.random_ltd.token_ops import (
    drop_tokens,
    dropped_layer,
    gather_tokens,
    restore_tokens,
    scatter_tokens,
)


@pytest.fixture(params=["indexing", "addresses"])
def way(request, monkeypatch):
    """Both of the CPU's ways for the same small tensors."""
    monkeypatch.setattr(cpu, "LARGE", 1 << 22 if request.param == "indexing" else 1)


def draw(batch: int, length: int, kept: int) -> torch.Tensor:
    return gpt_sample_tokens(kept, length, batch, key=5)[0][0]


def plainly(layer, x, indices, batch_first):
    """The same by torch's own indexing."""
    rows = x if batch_first else x.transpose(0, 1)
    at = torch.arange(rows.shape[0])[:, None], indices.long()
    kept = rows[at] if batch_first else rows[at].transpose(0, 1)
    computed = layer(kept)
    merged = rows.index_put(at, computed if batch_first else computed.transpose(0, 1))
    return merged if batch_first else merged.transpose(0, 1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch_first", [True, False])
def test_values_and_gradients_are_those_of_plain_indexing(batch_first):
    torch.manual_seed(0)
    indices = draw(3, 8, 5)
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    x = torch.randn((3, 8, 4) if batch_first else (8, 3, 4), dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    # The input is used beside the layer too, as a residual further back would.
    ours = (dropped_layer(layer, x, indices, batch_first) * weights + x**2).sum()
    plain = (plainly(layer, x, indices, batch_first) * weights + x**2).sum()
    assert torch.equal(ours, plain)
    for one, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_of_both_orders(batch_first):
    indices = draw(2, 5, 3)
    x = torch.randn((2, 5, 3) if batch_first else (5, 2, 3), dtype=torch.float64, requires_grad=True)

    def unit(x):
        return dropped_layer(lambda kept: kept.sin() * kept, x * 2, indices, batch_first)

    assert gradcheck(unit, (x,))
    assert gradgradcheck(unit, (x,))


def test_it_equals_gather_and_scatter_bit_by_bit():
    indices = draw(2, 40, 13)
    layer = nn.Linear(16, 16)
    x = torch.randn(2, 40, 16, requires_grad=True)

    def apart(x):
        handed_on, kept = gather_tokens(x, indices, True)
        return scatter_tokens(handed_on, layer(kept), indices, True)

    weights = torch.randn(2, 40, 16)
    fused, pair = dropped_layer(layer, x, indices), apart(x)
    assert torch.equal(fused, pair)
    inputs = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(fused, inputs, weights), torch.autograd.grad(pair, inputs, weights), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("what", ["detached", "a constant", "without the tokens"])
def test_a_layer_that_does_not_depend_on_its_tokens(what):
    indices = torch.tensor([[1, 3]])
    x = torch.randn(1, 4, 2, requires_grad=True)
    parameter = torch.randn(1, 2, 2, requires_grad=True)
    layer = {
        "detached": lambda kept: kept.detach(),
        "a constant": torch.zeros_like,
        "without the tokens": lambda kept: parameter * 1,
    }[what]
    dropped_layer(layer, x, indices).sum().backward()
    assert x.grad.tolist() == [[[1, 1], [0, 0], [1, 1], [0, 0]]]
    if what == "without the tokens":
        assert parameter.grad.tolist() == [[[1, 1], [1, 1]]]


def test_another_use_of_the_kept_tokens_adds_its_gradient():
    indices = torch.tensor([[1, 3]])
    x = torch.randn(1, 4, 2, requires_grad=True)
    passing, kept = drop_tokens(x, indices)
    merged = restore_tokens(passing, 2 * kept, indices)
    (merged.sum() + 3 * kept.sum()).backward()
    assert x.grad.tolist() == [[[1, 1], [5, 5], [1, 1], [5, 5]]]


def test_only_another_use_of_the_kept_tokens():
    indices = torch.tensor([[1, 3]])
    x = torch.randn(1, 4, 2, requires_grad=True)
    passing, kept = drop_tokens(x, indices)
    restore_tokens(passing, 2 * kept, indices)
    kept.sum().backward()
    assert x.grad.tolist() == [[[0, 0], [1, 1], [0, 0], [1, 1]]]


def test_input_without_gradient_and_layer_of_another_dtype():
    indices = draw(2, 6, 3)
    layer = nn.Linear(4, 4).bfloat16()
    x = torch.randn(2, 6, 4)
    merged = dropped_layer(lambda kept: layer(kept.bfloat16()), x, indices)
    assert merged.dtype == torch.float32
    merged.sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad.tolist() == [6, 6, 6, 6]


def test_incoming_gradients_are_not_changed_and_only_indices_are_saved():
    kept_for_backward = []

    def pack(tensor):
        kept_for_backward.append(tensor)
        return tensor

    indices = draw(2, 6, 3)
    x = torch.randn(2, 6, 4, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        merged = dropped_layer(lambda kept: -kept, x, indices)
    assert [(one.dtype, tuple(one.shape)) for one in kept_for_backward] == [(torch.int32, (2, 3))] * 2
    grad = torch.randn(2, 6, 4)
    before = grad.clone()
    merged.backward(grad)
    assert torch.equal(grad, before)
    assert x.grad.data_ptr() != grad.data_ptr()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch_first", [True, False])
def test_keeping_every_token_is_bitwise_the_layer(batch_first):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    x = torch.randn((3, 7, 16) if batch_first else (7, 3, 16), requires_grad=True)
    every = draw(3, 7, 7)
    weights = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    whole, unit = layer(x), dropped_layer(layer, x, every, batch_first)
    assert torch.equal(whole, unit)
    for one, other in zip(
        torch.autograd.grad(whole, inputs, weights), torch.autograd.grad(unit, inputs, weights), strict=True
    ):
        assert torch.equal(one, other)


# Dynamo's own way of tracing a Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_without_a_break_around_a_layer():
    torch.manual_seed(3)
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(2, 6, 4, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def unit(x, indices):
        handed_on, kept = gather_tokens(dropped_layer(layer, x * 2, indices), indices, True)
        return scatter_tokens(handed_on, layer(kept), indices, True) + handed_on

    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    for indices in (draw(2, 6, 3), draw(2, 6, 3) * 0 + torch.tensor([1, 4, 5], dtype=torch.int32)):
        plain, ours = unit(x, indices), compiled(x, indices)
        assert torch.equal(plain, ours)
        weights = torch.randn_like(plain)
        for one, other in zip(
            torch.autograd.grad(plain, inputs, weights), torch.autograd.grad(ours, inputs, weights), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_gradients_expectation_is_that_of_the_formula():
    """A linear model ``y = m * (x W) + (1 - m) * x``, each token kept with probability p.

    For the loss ``sum(c * y)``: E[dL/dW] = p x^T c, and E[dL/dx] = p c W^T + (1 - p) c.
    """
    torch.manual_seed(4)
    draws, length, kept, width = 4000, 12, 5, 3
    p = kept / length
    one_x, one_c = (torch.randn(1, length, width, dtype=torch.float64) for _ in range(2))
    w = torch.randn(width, width, dtype=torch.float64, requires_grad=True)
    x = one_x.repeat(draws, 1, 1).requires_grad_()
    merged = dropped_layer(lambda tokens: tokens @ w, x, draw(draws, length, kept))
    grad_w, grad_x = torch.autograd.grad((merged * one_c).sum() / draws, (w, x))
    expected_w = p * one_x[0].T @ one_c[0]
    expected_x = p * one_c @ w.detach().T + (1 - p) * one_c
    # Standard errors of the means over the draws; for W those of a sum over K of S things drawn without replacement.
    per_token = one_x[0][:, :, None] * one_c[0][:, None, :]
    error_w = (p * (1 - p) * length / (length - 1) * (per_token - per_token.mean(0)).pow(2).sum(0) / draws).sqrt()
    error_x = (p * (1 - p) / draws) ** 0.5 * (one_c @ w.detach().T - one_c).abs()
    assert bool(((grad_w - expected_w).abs() <= 5 * error_w).all())
    assert bool(((grad_x.sum(0, keepdim=True) - expected_x).abs() <= 5 * error_x).all())
    # The test has power: a gradient that forgot the tokens passing by would be far off.
    assert bool(((grad_w - grad_w / p).abs() > 5 * error_w).any())
