"""The reference GPT with layers that drop tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from penstock._core.batch_key import BatchKey, entered
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop, convert_to_random_ltd, save_without_random_ltd
from penstock.data_pipeline.random_ltd.sampling import keyed_indices
from penstock.models import GPTBlock, GPTConfig, gpt_block_indices, gpt_layers, gpt_loss, gpt_model
from penstock.pipe.module import PipelineModule
from support.models_gpt_reference import reference_block, spread


def config(**changes):
    shape = {"vocab_size": 50, "num_layers": 4, "hidden_size": 12, "num_heads": 3, "context_length": 16}
    return GPTConfig(**{**shape, **changes})


def dropping(model, kept):
    convert_to_random_ltd(model, GPTBlock)
    for layer in model.modules():
        if isinstance(layer, RandomLayerTokenDrop):
            layer.reserved_length = kept
    return model


TOKENS = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))


def key(rows=slice(None), **changes):
    return BatchKey(**{"seed": 1, "step": 0, "micro_batch": 0, "positions": tuple([5, 90, 17, 3][rows]), **changes})


def grads(model, tokens=TOKENS, where=None, scale=1.0):
    model.zero_grad()
    with entered(where or key()):
        loss = gpt_loss(model(tokens), tokens)
    (loss * scale).backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_keeping_the_whole_sequence_is_bitwise_the_plain_model(positions):
    plain = grads(gpt_model(config(positions=positions)))
    kept_all = grads(dropping(gpt_model(config(positions=positions)), 16))
    assert torch.equal(plain[0], kept_all[0])
    for ours, theirs in zip(kept_all[1], plain[1], strict=True):
        assert torch.equal(ours, theirs)


def test_eval_is_bitwise_the_plain_model():
    model = dropping(gpt_model(config()), 4).eval()
    assert torch.equal(model(TOKENS), gpt_model(config())(TOKENS))


def test_losses_and_gradients_do_not_depend_on_the_split_into_micro_batches():
    model = dropping(gpt_model(config()), 6).double()
    loss, whole = grads(model)
    losses, sums = [], [torch.zeros_like(grad) for grad in whole]
    for rows in (slice(0, 1), slice(1, 4)):
        share = len(range(*rows.indices(4))) / 4
        part, part_grads = grads(model, TOKENS[rows], key(rows, micro_batch=9), scale=share)
        losses.append(part * share)
        sums = [total + grad for total, grad in zip(sums, part_grads, strict=True)]
    torch.testing.assert_close(sum(losses), loss, rtol=1e-12, atol=0)
    for ours, theirs in zip(sums, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("interval", [0, 1, 2])
def test_stages_with_recomputation_give_the_loss_and_gradients_of_the_plain_model(stages, interval):
    reference = dropping(gpt_model(config(dropout=0.0)), 6)
    loss, expected = grads(reference)
    pipeline = PipelineModule(gpt_layers(config()), num_stages=stages, activation_checkpoint_interval=interval)
    built = [pipeline.build_stage(stage) for stage in range(stages)]
    first_block = gpt_block_indices(config())[0]

    def wrap(index, layer):
        if not isinstance(layer, GPTBlock):
            return None
        return RandomLayerTokenDrop(layer, index - first_block, reserved_length=6)

    value = TOKENS
    for stage in built:
        stage.wrap_layers(wrap)
        value = stage(value, key())
    ours = gpt_loss(value, TOKENS)
    ours.backward()
    assert torch.equal(ours.detach(), loss)
    tied = [parameter for stage in built for copies in stage.tied.values() for _, parameter in copies]
    got = {name: parameter.grad for stage in built for name, parameter in stage.canonical_parameters()}
    got["layer_000.weight"] = sum(parameter.grad for parameter in tied)
    names = [
        name for name, _ in PipelineModule(gpt_layers(config()), num_stages=1).build_stage(0).canonical_parameters()
    ]
    for name, theirs in zip(names, expected, strict=True):
        # The two uses of the tied weight are summed in another order.
        tolerance = 1e-6 if name == "layer_000.weight" else 0
        torch.testing.assert_close(got[name], theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_a_converted_model_saves_what_the_original_loads():
    trained = dropping(gpt_model(config(), base_seed=2), 6)
    original = gpt_model(config(), base_seed=3)
    original.load_state_dict(save_without_random_ltd(trained))
    assert torch.equal(original(TOKENS), trained.eval()(TOKENS))


def test_every_layer_drops_and_counts():
    model = dropping(gpt_model(config()), 6)
    with entered(key()):
        model(TOKENS)
    layers = [layer for layer in model.modules() if isinstance(layer, RandomLayerTokenDrop)]
    assert [(layer.computed_tokens, layer.passed_tokens) for layer in layers] == [(24, 40)] * 4


@settings(max_examples=25)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 10),
    share=st.floats(0, 1),
    heads=st.integers(1, 3),
    positions=st.sampled_from(["rope", "learned"]),
    position_of_first=st.integers(0, 2**40),
)
def test_a_dropping_block_restricts_attention_to_the_kept_tokens(
    rows, length, share, heads, positions, position_of_first
):
    torch.manual_seed(0)
    shape = config(num_heads=heads, hidden_size=4 * heads, positions=positions)
    block, kept = spread(GPTBlock(shape)), max(1, round(share * length))
    sample_positions = tuple(range(position_of_first, position_of_first + rows))
    hidden = torch.randn(rows, length, 4 * heads, dtype=torch.float64)
    ids = torch.arange(length).expand(rows, length)
    with entered(key(positions=sample_positions)):
        out = RandomLayerTokenDrop(block, 2, reserved_length=kept)({"hidden": hidden, "position_ids": ids})
    is_kept = torch.zeros(rows, length, dtype=torch.bool)
    indices = keyed_indices(1, sample_positions, [2], length, kept)[0]
    is_kept[torch.arange(rows)[:, None], torch.from_numpy(indices).long()] = True
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & is_kept[:, None, :] & is_kept[:, :, None]
    computed = reference_block(block, shape, hidden, ids, allowed)
    torch.testing.assert_close(out["hidden"], torch.where(is_kept[..., None], computed, hidden))
    assert out["position_ids"] is ids


@pytest.mark.parametrize("kept", [16, 8])
def test_training_with_and_without_dropping_lowers_the_loss_of_the_whole_model(kept):
    model = dropping(gpt_model(config(num_layers=3)), kept)
    labels = TOKENS.roll(-1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        with torch.no_grad():
            losses.append(float(gpt_loss(model.eval()(TOKENS), labels)))
        optimizer.zero_grad()
        with entered(key(step=step, positions=tuple(range(4 * step, 4 * step + 4)))):
            gpt_loss(model.train()(TOKENS), labels).backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_gradients_through_a_dropping_block(positions):
    torch.manual_seed(0)
    shape = config(num_heads=2, hidden_size=4, mlp_ratio=1.0, positions=positions)
    layer = RandomLayerTokenDrop(spread(GPTBlock(shape)), 1, reserved_length=3)
    hidden = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(5).expand(2, 5)

    def run(hidden, *_parameters):
        with entered(key(slice(0, 2))):
            return layer({"hidden": hidden, "position_ids": ids})["hidden"]

    assert gradcheck(run, (hidden, *layer.parameters()))


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("kept", [None, 6])
def test_packed_documents_are_computed_as_if_each_had_a_row_of_its_own(positions, kept):
    """With dropping, the kept tokens of the packed row's document are those of the row, so the choice is made once."""
    documents = [(0, 5), (5, 12), (12, 16)]
    ids = torch.cat([torch.full((stop - start,), at) for at, (start, stop) in enumerate(documents)])
    places = torch.cat([torch.arange(stop - start) for start, stop in documents])
    packed = {"input_ids": TOKENS[:1], "document_ids": ids[None], "position_ids": places[None]}
    model = dropping(gpt_model(config(positions=positions)), kept).double()
    seen = {}
    wrapped = [layer for layer in model.modules() if isinstance(layer, RandomLayerTokenDrop)]
    for layer in wrapped:
        layer.random_ltd_layer.register_forward_hook(
            lambda block, args, out, at=layer.layer_id: seen.update({at: args[0]})
        )
    with entered(key(slice(0, 1))):
        logits = model(packed)
    plain = gpt_model(config(positions=positions)).double()
    for at, (start, stop) in enumerate(documents):
        value = plain.layers[0]({"input_ids": TOKENS[:1, start:stop], "position_ids": places[None, start:stop]})
        blocks = plain.layers[1:-1]
        if positions == "learned":
            value, blocks = blocks[0](value), blocks[1:]
        for number, block in enumerate(blocks):
            chosen = torch.ones(stop - start, dtype=torch.bool)
            if kept is not None:
                given = seen[number]
                mine = given["position_ids"][0][given["document_ids"][0] == at]
                chosen = torch.zeros(stop - start, dtype=torch.bool).index_fill(0, mine, True)
            if chosen.any():
                hidden = value["hidden"].clone()
                part = {"hidden": hidden[:, chosen], "position_ids": value["position_ids"][:, chosen]}
                hidden[:, chosen] = block(part)["hidden"]
                value = {**value, "hidden": hidden}
        expected = plain.layers[-1](value) @ plain.layers[0].weight.T
        torch.testing.assert_close(logits[:, start:stop], expected, rtol=1e-9, atol=1e-12)


def test_ids_of_documents_are_one_for_each_token():
    model = gpt_model(config())
    with pytest.raises(ValueError, match=r"document_ids must be one for each token, \(4, 16\); got \(16,\)"):
        model({"input_ids": TOKENS, "document_ids": torch.zeros(16)})
    with pytest.raises(ValueError, match="under 'input_ids'; got None"):
        model({"document_ids": TOKENS})
