import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from penstock._core.batch_key import BatchKey, entered
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop
from penstock.data_pipeline.random_ltd.sampling import keyed_indices

PARTS = ("begin", "inside", "end")


class Mix(nn.Module):
    """Each token becomes a mixture of those before it, weighed by their positions."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, hidden_states, position_ids):
        mask = torch.ones(hidden_states.shape[1], hidden_states.shape[1], dtype=torch.float64).tril()
        weight = mask / (1 + (position_ids[:, :, None] - position_ids[:, None, :]).abs())
        return hidden_states + torch.tanh(self.linear(weight @ hidden_states))


class MixDict(Mix):
    def forward(self, value):
        return {**value, "hidden": super().forward(value["hidden"], value["position_ids"])}


def route(layers, kept, parts=PARTS, first_id=5, **more):
    return nn.ModuleList(
        RandomLayerTokenDrop(layer, first_id, reserved_length=kept, route=part, **more)
        for layer, part in zip(layers, parts, strict=True)
    )


def key(positions, **changes):
    return BatchKey(**{"seed": 1, "step": 0, "micro_batch": 0, "positions": tuple(positions), **changes})


HIDDEN = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(9).expand(2, 9)


def run(wrapped, hidden=HIDDEN, ids=IDS, positions=(7, 8)):
    with entered(key(positions)):
        for layer in wrapped:
            hidden = layer(hidden, position_ids=ids)
    return hidden


def run_dict(wrapped, hidden=HIDDEN, ids=IDS, positions=(7, 8)):
    value = {"hidden": hidden, "position_ids": ids}
    with entered(key(positions)):
        for layer in wrapped:
            value = layer(value)
    assert set(value) == {"hidden", "position_ids"}
    assert value["position_ids"] is ids
    return value["hidden"]


def reference(layers, hidden=HIDDEN, ids=IDS, positions=(7, 8), kept=5):
    out = hidden.clone()
    indices = torch.from_numpy(keyed_indices(1, positions, [5], hidden.shape[1], kept)[0]).long()
    for row, at in enumerate(indices):
        tokens = hidden[row : row + 1, at]
        for layer in layers:
            tokens = Mix.forward(layer, tokens, ids[row : row + 1, at])
        out[row, at] = tokens[0]
    return out


def mixers(kind):
    torch.manual_seed(0)
    return [kind() for _ in PARTS]


@pytest.mark.parametrize(("kind", "call"), [(Mix, run), (MixDict, run_dict)])
def test_tokens_leave_before_the_first_layer_and_return_after_the_last(kind, call):
    layers = mixers(kind)
    wrapped = route(layers, 5)
    torch.testing.assert_close(call(wrapped), reference(layers), rtol=1e-14, atol=1e-14)
    assert [(layer.computed_tokens, layer.passed_tokens) for layer in wrapped] == [(10, 8)] * 3


@pytest.mark.parametrize(("kind", "call"), [(Mix, run), (MixDict, run_dict)])
def test_gradients(kind, call):
    layers = mixers(kind)
    wrapped = route(layers, 5)
    hidden = HIDDEN.clone().requires_grad_()
    weights = [layer.linear.weight for layer in layers]
    ours = torch.autograd.grad(call(wrapped, hidden).square().sum(), [hidden, *weights])
    theirs = torch.autograd.grad(reference(layers, hidden).square().sum(), [hidden, *weights])
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "call"), [(Mix, run), (MixDict, run_dict)])
@pytest.mark.parametrize("kept", [9, None])
def test_keeping_all_and_eval_are_the_layers_themselves(kind, call, kept):
    layers = mixers(kind)
    plain = HIDDEN
    for layer in layers:
        plain = Mix.forward(layer, plain, IDS)
    assert torch.equal(call(route(layers, kept)), plain)
    assert torch.equal(call(route(layers, 3).eval()), plain)


def test_several_micro_batches_in_flight():
    layers = mixers(Mix)
    wrapped = route(layers, 5)
    values = []
    for positions in ((7, 8), (20, 21)):
        with entered(key(positions)):
            values.append(wrapped[0](HIDDEN, position_ids=IDS))
    for layer in wrapped[1:]:
        values = [layer(value, position_ids=IDS) for value in reversed(values)]
    for value, positions in zip(values, ((7, 8), (20, 21)), strict=True):
        torch.testing.assert_close(value, reference(layers, positions=positions))


@pytest.mark.parametrize("kind", [Mix, MixDict])
def test_layers_that_are_computed_again_in_the_backward_pass(kind):
    wrapped = route(mixers(kind), 5)

    def recomputed(hidden, ids=IDS):
        value = hidden if kind is Mix else {"hidden": hidden, "position_ids": ids}

        def call(layer, value):
            with entered(key((7, 8))):
                return layer(value, position_ids=ids) if kind is Mix else layer(value)

        for layer in wrapped:
            value = checkpoint(call, layer, value, use_reentrant=False)
        return value if kind is Mix else value["hidden"]

    grads = []
    for forward in (run if kind is Mix else run_dict, recomputed):
        hidden = HIDDEN.clone().requires_grad_()
        first = forward(hidden) if forward is recomputed else forward(wrapped, hidden)
        other = forward(hidden * 2) if forward is recomputed else forward(wrapped, hidden * 2)
        grads.append(torch.autograd.grad(first.square().sum() + other.sum(), [hidden, *wrapped.parameters()]))
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-12, atol=1e-12)


def test_sequence_first():
    layers = [nn.Linear(4, 4, dtype=torch.float64) for _ in PARTS]
    first = route(layers, 5, hidden_state_order="seq_batch_dim")
    with entered(key((7, 8))):
        hidden = HIDDEN.transpose(0, 1)
        for layer in first:
            hidden = layer(hidden)
        other = HIDDEN
        for layer in route(layers, 5):
            other = layer(other)
    torch.testing.assert_close(hidden.transpose(0, 1), other)


def test_a_route_that_something_came_between_is_refused():
    wrapped = route(mixers(Mix), 5)
    begun = wrapped[0](HIDDEN, position_ids=IDS)
    with pytest.raises(ValueError, match=r"layer 5 is in a route .* made a new tensor"):
        wrapped[1](begun * 1, position_ids=IDS)
    with pytest.raises(ValueError, match="begin, inside, end, or None; got 'middle'"):
        RandomLayerTokenDrop(Mix(), route="middle")
