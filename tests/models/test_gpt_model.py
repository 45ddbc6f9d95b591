import math

import pytest
import torch
import torch.nn.functional as F

from penstock.models import GPTBlock, GPTConfig, gpt_block_indices, gpt_layers, gpt_loss, gpt_model
from penstock.pipe.module import PipelineModule, TiedLayerSpec
from support.models_gpt_reference import reference_block, spread


def small(**changes):
    shape = {"vocab_size": 50, "num_layers": 2, "hidden_size": 12, "num_heads": 3, "context_length": 16}
    return GPTConfig(**{**shape, **changes})


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_block_equals_the_plain_formula(positions):
    torch.manual_seed(0)
    config = small(positions=positions)
    block = spread(GPTBlock(config))
    hidden, ids = torch.randn(2, 7, 12, dtype=torch.float64), torch.arange(7).expand(2, 7)
    out = block({"hidden": hidden, "position_ids": ids})
    causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 7, 7)
    torch.testing.assert_close(out["hidden"], reference_block(block, config, hidden, ids, causal))
    assert out["position_ids"] is ids


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_block_on_kept_tokens_is_the_full_block_with_attention_restricted_to_them(positions):
    torch.manual_seed(0)
    config = small(positions=positions)
    block = spread(GPTBlock(config))
    hidden = torch.randn(2, 9, 12, dtype=torch.float64)
    kept = torch.tensor([[0, 3, 4, 8], [1, 2, 6, 7]])
    rows = torch.arange(2)[:, None]
    out = block({"hidden": hidden[rows, kept], "position_ids": kept})["hidden"]
    is_kept = torch.zeros(2, 9, dtype=torch.bool)
    is_kept[rows, kept] = True
    allowed = torch.ones(9, 9, dtype=torch.bool).tril() & is_kept[:, None, :] & is_kept[:, :, None]
    full = reference_block(block, config, hidden, torch.arange(9).expand(2, 9), allowed)
    torch.testing.assert_close(out, full[rows, kept])


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_model_is_the_pipelines_layers_with_the_same_weights(positions, tied):
    config = small(positions=positions, tie_embeddings=tied)
    model = gpt_model(config, base_seed=7)
    tokens = torch.randint(0, 50, (2, 16))
    pipeline = PipelineModule(gpt_layers(config), num_stages=3, base_seed=7)
    value = tokens
    for stage in range(3):
        value = pipeline.build_stage(stage)(value)
    assert torch.equal(value, model(tokens))
    assert value.shape == (2, 16, 50)
    assert sum(p.numel() for p in model.parameters()) == pipeline.total_parameters
    assert len(list(gpt_block_indices(config))) == 2
    specs = gpt_layers(config)
    assert all(specs[i].typename is GPTBlock for i in gpt_block_indices(config))


def test_the_parameters_are_those_of_the_formula():
    config = small()
    per_block = 12 * 36 + 12 * 12 + 2 * 12 * 48 + 2 * 12
    assert PipelineModule(gpt_layers(config), num_stages=1).total_parameters == 50 * 12 + 2 * per_block + 12
    untied = small(tie_embeddings=False, positions="learned")
    expected = 2 * 50 * 12 + 16 * 12 + 2 * per_block + 12
    assert PipelineModule(gpt_layers(untied), num_stages=1).total_parameters == expected


def test_tied_layers_share_one_weight():
    first, *_, last = gpt_layers(small())
    assert isinstance(first, TiedLayerSpec)
    assert isinstance(last, TiedLayerSpec)
    assert first.key == last.key
    assert not any(isinstance(spec, TiedLayerSpec) for spec in gpt_layers(small(tie_embeddings=False)))


def test_no_token_sees_what_comes_after_it():
    model = gpt_model(small())
    tokens = torch.randint(0, 50, (1, 16))
    other = tokens.clone()
    other[0, 9] = (other[0, 9] + 1) % 50
    same = (model(tokens) == model(other)).all(-1)[0]
    assert bool(same[:9].all())
    assert not bool(same[9:].any())


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_the_order_of_tokens_matters(positions):
    model = gpt_model(small(positions=positions))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    a, b = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert not torch.allclose(a[0, -1], b[0, -1])


def test_initial_weights_have_the_stated_spread():
    config = small(hidden_size=96, vocab_size=500, num_layers=8, init_std=0.03)
    model = gpt_model(config)
    residual = 0.03 / math.sqrt(16)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            expected = residual if name.endswith(("attn.out.weight", "mlp.down.weight")) else 0.03
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05)


def test_dropout_is_off_in_eval_and_on_in_training():
    model = gpt_model(small(dropout=0.5))
    plain = gpt_model(small())
    tokens = torch.randint(0, 50, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), plain(tokens))


def test_gradients_reach_every_parameter():
    model = gpt_model(small(positions="learned", tie_embeddings=False))
    tokens = torch.randint(0, 50, (2, 16))
    gpt_loss(model(tokens), tokens).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_the_loss_is_the_mean_over_the_labels_that_count():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 4], [0, 2, -100]])
    terms = [-math.log(logits[b, s].softmax(-1)[labels[b, s]]) for b, s in [(0, 0), (0, 2), (1, 0), (1, 1)]]
    assert float(gpt_loss(logits, labels)) == pytest.approx(sum(terms) / 4, rel=1e-12)
    half = gpt_loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(
        float(F.cross_entropy(logits.bfloat16().double().flatten(0, 1), labels.flatten()))
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 17, dtype=torch.int64), "17 tokens does not fit the model's context_length=16"),
        (torch.zeros(17, dtype=torch.int64), r"integer token ids of shape \[batch, tokens\]"),
        (torch.zeros(1, 4), "got torch.float32"),
    ],
)
def test_mistakes_are_named(tokens, message):
    with pytest.raises(ValueError, match=message):
        gpt_model(small())(tokens)


def test_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) do not go with labels of shape \(2, 4\)"):
        gpt_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
