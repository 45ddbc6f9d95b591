"""``torch.compile`` around layers that drop tokens."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from penstock._core.batch_key import BatchKey, entered
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop
from penstock.models import GPTBlock, GPTConfig

# torch.compile makes an instance of an autograd function while it traces, and PyTorch deprecates that.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

CONFIG = GPTConfig(vocab_size=50, num_layers=3, hidden_size=16, num_heads=2, context_length=16)
HIDDEN = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(16).expand(2, 16)
PROTECTED = (torch.arange(16) % 5 == 0).expand(2, 16)


def blocks(route):
    torch.manual_seed(0)
    parts = ("begin", "inside", "end") if route else (None, None, None)
    return nn.Sequential(
        *(RandomLayerTokenDrop(GPTBlock(CONFIG), 0 if route else at, route=part) for at, part in enumerate(parts))
    )


def step(call, layers, where, **more):
    layers.zero_grad()
    hidden = HIDDEN.clone().requires_grad_()
    with entered(where):
        out = call({"hidden": hidden, "position_ids": IDS, **more})["hidden"]
    out.square().sum().backward()
    return [out.detach(), hidden.grad, *(parameter.grad.clone() for parameter in layers.parameters())]


@pytest.mark.parametrize(("backend", "route"), [("eager", False), ("aot_eager", False), ("aot_eager", True)])
def test_one_graph_for_each_kept_length_and_the_choice_is_made_when_it_runs(backend, route):
    torch._dynamo.reset()
    layers, counter = blocks(route), CompileCounterWithBackend(backend)
    compiled = torch.compile(layers, backend=counter, fullgraph=True)
    seen = []
    for kept in (4, 6, 4):
        for layer in layers:
            layer.reserved_length = kept
        for positions in ((3, 4), (8, 9)):
            where = BatchKey(seed=1, step=0, micro_batch=0, positions=positions)
            plain = step(layers, layers, where)
            for ours, expected in zip(step(compiled, layers, where), plain, strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
            seen.append(plain[0])
    assert counter.frame_count == 2
    assert not torch.allclose(seen[0], seen[1])


def test_protected_tokens_and_no_engine():
    torch._dynamo.reset()
    layers = blocks(route=True)
    for layer in layers:
        layer.reserved_length = 6
    compiled = torch.compile(layers, backend="eager", fullgraph=True)
    results = []
    for call in (layers, compiled):
        torch.manual_seed(3)
        results.append(step(call, layers, None, protected_tokens=PROTECTED))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(step(compiled, layers, None, protected_tokens=PROTECTED)[0], results[0][0])
    assert bool((results[0][0] != HIDDEN).any(-1)[PROTECTED].all())


def test_a_layer_called_twice_chooses_twice():
    """Equal calls of an operator in one graph are merged, unless something tells them apart."""
    torch._dynamo.reset()
    layer = RandomLayerTokenDrop(blocks(route=False)[0].random_ltd_layer, reserved_length=6)
    twice = nn.Sequential(layer, layer)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    results = []
    for call in (twice, compiled):
        torch.manual_seed(3)
        results.append(step(call, layer, None))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
