import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from penstock._core.batch_key import BatchKey, entered
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop
from penstock.data_pipeline.random_ltd.sampling import keyed_indices

Pair = namedtuple("Pair", ["hidden", "extra"])


class Recorder(nn.Module):
    """Adds one to every token it sees and remembers the call."""

    def __init__(self, wrap=lambda hidden: hidden):
        super().__init__()
        self.wrap = wrap
        self.calls = []

    def forward(self, hidden_states, *args, **kwargs):
        self.calls.append((hidden_states, args, kwargs))
        if isinstance(hidden_states, dict):
            return {**hidden_states, "hidden": hidden_states["hidden"] + 1}
        return self.wrap(hidden_states + 1)


def key(positions=(), seed=1, step=0, micro_batch=0):
    return BatchKey(seed=seed, step=step, micro_batch=micro_batch, positions=tuple(positions))


def computed(wrapper, hidden):
    """Where the layer was at work, [B, S]."""
    return (wrapper(hidden) != hidden).any(-1)


def test_the_kept_tokens_go_through_the_layer_and_the_others_pass_by():
    wrapper = RandomLayerTokenDrop(Recorder(), layer_id=4, reserved_length=3)
    hidden = torch.zeros(2, 8, 5)
    with entered(key([10, 11])):
        out = wrapper(hidden)
    expected = torch.zeros(2, 8, 5)
    for row, at in enumerate(keyed_indices(1, [10, 11], [4], 8, 3)[0]):
        expected[row, torch.from_numpy(at).long()] = 1
    assert torch.equal(out, expected)
    assert (wrapper.computed_tokens, wrapper.passed_tokens) == (6, 10)


def test_sequence_first_hidden_states():
    wrapper = RandomLayerTokenDrop(Recorder(), 4, reserved_length=3, hidden_state_order="seq_batch_dim")
    other = RandomLayerTokenDrop(Recorder(), 4, reserved_length=3)
    hidden = torch.randn(8, 2, 5)
    with entered(key([10, 11])):
        assert torch.equal(wrapper(hidden), other(hidden.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("reserved", [None, 8, 9])
def test_keeping_all_tokens_is_the_layer_itself(reserved):
    layer = Recorder()
    wrapper = RandomLayerTokenDrop(layer, reserved_length=reserved)
    hidden, mask = torch.randn(2, 8, 5), torch.ones(2, 8)
    wrapper(hidden, mask, scale=2)
    seen, args, kwargs = layer.calls[0]
    assert seen is hidden
    assert args[0] is mask
    assert kwargs == {"scale": 2}
    assert (wrapper.computed_tokens, wrapper.passed_tokens) == (16, 0)


def test_eval_mode_never_drops():
    layer = Recorder()
    wrapper = RandomLayerTokenDrop(layer, reserved_length=2).eval()
    hidden = torch.randn(2, 8, 5)
    assert torch.equal(wrapper(hidden), hidden + 1)
    assert layer.calls[0][0] is hidden


def test_the_choice_does_not_depend_on_the_split_into_micro_batches():
    wrapper = RandomLayerTokenDrop(Recorder(), 2, reserved_length=5)
    hidden, positions = torch.zeros(6, 16, 1), [40, 41, 7, 99, 3, 1000]
    with entered(key(positions)):
        whole = wrapper(hidden)
    for size in (1, 2, 3):
        parts = []
        for micro_batch, start in enumerate(range(0, 6, size)):
            # Step and micro-batch differ on purpose: with positions they have no say.
            with entered(key(positions[start : start + size], step=start, micro_batch=micro_batch)):
                parts.append(wrapper(hidden[start : start + size]))
        assert torch.equal(torch.cat(parts), whole)


def test_without_positions_step_and_micro_batch_decide():
    wrapper, hidden = RandomLayerTokenDrop(Recorder(), 2, reserved_length=50), torch.zeros(1, 100, 1)
    outs = []
    for where in (key(), key(step=1), key(micro_batch=1), key(seed=2), key()):
        with entered(where):
            outs.append(wrapper(hidden))
    assert torch.equal(outs[0], outs[4])
    assert all(not torch.equal(outs[0], other) for other in outs[1:4])


def test_layers_choose_different_tokens():
    hidden = torch.zeros(1, 100, 1)
    with entered(key([5])):
        first, second = (RandomLayerTokenDrop(Recorder(), i, reserved_length=50)(hidden) for i in (0, 1))
    assert not torch.equal(first, second)


def test_outside_an_engine_torchs_seed_decides():
    wrapper, hidden = RandomLayerTokenDrop(Recorder(), reserved_length=50), torch.zeros(2, 100, 1)
    torch.manual_seed(0)
    first, second = wrapper(hidden), wrapper(hidden)
    torch.manual_seed(0)
    assert torch.equal(wrapper(hidden), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("keyed", [True, False])
def test_recomputation_chooses_the_same_tokens(keyed):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=torch.float64)
    wrapper = RandomLayerTokenDrop(layer, 1, reserved_length=5)
    hidden = torch.randn(2, 32, 4, dtype=torch.float64, requires_grad=True)
    where = key([3, 4]) if keyed else None

    def run(hidden):
        with entered(where):
            return wrapper(hidden)

    grads = []
    for forward in (run, lambda hidden: checkpoint(run, hidden, use_reentrant=False)):
        torch.manual_seed(1)
        loss = forward(hidden).square().sum()
        torch.rand(7)
        grads.append(torch.autograd.grad(loss, (hidden, *layer.parameters())))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("wrap", [lambda h: (h, "cache"), lambda h: [h, "cache"], lambda h: Pair(h, "cache")])
def test_outputs_in_tuples_and_lists(wrap):
    wrapper = RandomLayerTokenDrop(Recorder(wrap), reserved_length=3)
    hidden = torch.zeros(2, 8, 5)
    out = wrapper(hidden)
    assert type(out) is type(wrap(hidden))
    assert out[0].shape == hidden.shape
    assert int(out[0].sum()) == 2 * 3 * 5
    assert out[1] == "cache"


def test_a_dict_keeps_its_other_entries_as_they_came():
    layer = Recorder()
    wrapper = RandomLayerTokenDrop(layer, 3, reserved_length=3)
    position_ids = torch.arange(8).expand(2, 8)
    value = {"hidden": torch.zeros(2, 8, 5), "position_ids": position_ids, "scale": 2.0, "loss": torch.zeros(())}
    with entered(key([10, 11])):
        out = wrapper(value)
    assert out["position_ids"] is position_ids
    assert out["scale"] == 2.0
    assert out["loss"] is value["loss"]
    kept = torch.from_numpy(keyed_indices(1, [10, 11], [3], 8, 3)[0])
    assert torch.equal(layer.calls[0][0]["position_ids"], kept.long())
    assert torch.equal((out["hidden"][..., 0] == 1).nonzero()[:, 1].reshape(2, 3), kept.long())
    assert set(value) == set(out)
    assert value["hidden"].sum() == 0


def test_what_a_layer_puts_into_the_dict_goes_on():
    class Counts(nn.Module):
        def forward(self, value):
            return {**value, "loss": value["loss"] + 1, "more": "new"}

    wrapper = RandomLayerTokenDrop(Counts(), reserved_length=3)
    out = wrapper({"hidden": torch.zeros(2, 8, 5), "loss": torch.zeros(())})
    assert out["loss"] == 1
    assert out["more"] == "new"


def test_hidden_states_given_by_keyword():
    layer = Recorder()
    wrapper = RandomLayerTokenDrop(layer, reserved_length=3)
    out = wrapper(hidden_states=torch.zeros(2, 8, 5), position_ids=torch.arange(8).expand(2, 8))
    assert int(out.sum()) == 2 * 3 * 5
    assert layer.calls[0][2]["position_ids"].shape == (2, 3)


def test_the_expected_gradient_over_draws_is_the_formula():
    """On a linear layer y = x W: E[dL/dW] = K/S sum_t x_t g_t^T and E[dL/dx_t] = (K/S) W g_t + (1 - K/S) g_t."""
    draws, length, kept, width = 4000, 6, 2, 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(length, width, dtype=torch.float64, generator=generator)
    g = torch.randn(length, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(width, width, dtype=torch.float64, generator=generator)

    class PerSample(nn.Module):
        """A weight for each row, so that each draw's gradient can be seen."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight.expand(draws, width, width).clone())

        def forward(self, hidden):
            return hidden @ self.weight

    layer = PerSample()
    wrapper = RandomLayerTokenDrop(layer, reserved_length=kept)
    hidden = x.expand(draws, length, width).clone().requires_grad_()
    with entered(key(range(draws))):
        (wrapper(hidden) * g).sum().backward()
    share = kept / length
    for grads, formula in (
        (layer.weight.grad, share * x.T @ g),
        (hidden.grad, share * g @ weight.T + (1 - share) * g),
    ):
        error = (grads.mean(0) - formula).abs()
        assert bool((error <= 5 * grads.std(0) / draws**0.5 + 1e-12).all())


def test_state_dicts_have_the_layers_own_keys():
    def model():
        return nn.Sequential(
            OrderedDict(
                embed=nn.Linear(4, 4), block=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), head=nn.Linear(4, 2)
            )
        )

    plain, dropping = model(), model()
    dropping.block = RandomLayerTokenDrop(dropping.block)
    state = dropping.state_dict()
    assert list(state) == list(plain.state_dict())
    assert state._metadata == plain.state_dict()._metadata
    plain.load_state_dict(state)
    for ours, theirs in zip(dropping.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = copy.deepcopy(dropping)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert not other.load_state_dict(plain.state_dict()).missing_keys
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_wrapper_as_the_whole_model_and_inside_another_level():
    inner = RandomLayerTokenDrop(nn.Linear(3, 3))
    assert list(inner.state_dict()) == ["weight", "bias"]
    inner.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.zeros(3)})
    assert torch.equal(inner.random_ltd_layer.weight, torch.ones(3, 3))
    assert list(inner.state_dict(prefix="a.b.")) == ["a.b.weight", "a.b.bias"]


def test_strict_loading_still_notices():
    model = nn.Sequential(RandomLayerTokenDrop(nn.Linear(3, 3)))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.weight": torch.ones(3, 3)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3), "0.more": torch.ones(3)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomLayerTokenDrop(RandomLayerTokenDrop(nn.Identity())), "drop twice"),
        (lambda: RandomLayerTokenDrop(nn.Identity(), hidden_state_order="bsh"), "batch_seq_dim, seq_batch_dim"),
        (lambda: RandomLayerTokenDrop(nn.Identity(), reserved_length=0), "at least 1 token"),
        (lambda: RandomLayerTokenDrop(nn.Identity())("text"), "found str"),
        (lambda: RandomLayerTokenDrop(nn.Identity())(torch.zeros(2, 3)), r"found shape \(2, 3\)"),
        (
            lambda: RandomLayerTokenDrop(Recorder(str), reserved_length=2)(torch.zeros(2, 3, 4)),
            "the layer returned str",
        ),
        (
            lambda: RandomLayerTokenDrop(Recorder(lambda h: h[:, :1]), reserved_length=2)(torch.zeros(2, 3, 4)),
            r"must have shape \(2, 2, 4\)",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_positions_that_do_not_go_with_the_rows():
    wrapper = RandomLayerTokenDrop(Recorder(), reserved_length=2)
    with entered(key([1, 2, 3])), pytest.raises(ValueError, match="2 rows but its key lists 3 positions"):
        wrapper(torch.zeros(2, 8, 5))
