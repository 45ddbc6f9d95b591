"""The reference BERT beside Hugging Face's, in a pipeline, and with layers that drop tokens."""

import pytest
import torch

import penstock
from penstock._core.batch_key import BatchKey, entered
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop, convert_to_random_ltd
from penstock.models import (
    BERTBlock,
    BERTConfig,
    bert_block_indices,
    bert_layer_flops,
    bert_layers,
    bert_loss,
    bert_model,
    mask_tokens,
)
from penstock.pipe.module import PipelineModule

CONFIG = BERTConfig(vocab_size=50, num_layers=3, hidden_size=16, num_heads=4, context_length=12)
IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 12, [1] * 8 + [0] * 4, [1] + [0] * 11])
TYPES = (torch.arange(12) >= 5).long().expand(3, 12)
KEY = BatchKey(seed=1, step=0, micro_batch=0, positions=(5, 90, 17))


def batch():
    return {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}


def peer():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 12}
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, **shape
    )
    return transformers.BertForMaskedLM(config)


def copied(ours, theirs):
    """The peer's random weights in our model, by name."""
    embedding, positions, *blocks, transform, bias = ours.layers
    bert, head = theirs.bert, theirs.cls.predictions
    pairs = [
        (embedding.weight, bert.embeddings.word_embeddings.weight),
        (positions.positions, bert.embeddings.position_embeddings.weight),
        (positions.types, bert.embeddings.token_type_embeddings.weight),
        (positions.norm, bert.embeddings.LayerNorm),
        (transform.linear, head.transform.dense),
        (transform.norm, head.transform.LayerNorm),
        (bias.bias, head.bias),
    ]
    for block, layer in zip(blocks, bert.encoder.layer, strict=True):
        attention = layer.attention.self
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (attention.query, attention.key, attention.value)]
            by_head = [part.unflatten(0, (CONFIG.num_heads, CONFIG.head_size)) for part in parts]
            pairs.append((getattr(block.qkv, name), torch.stack(by_head, dim=1).flatten(0, 2)))
        pairs += [
            (block.out, layer.attention.output.dense),
            (block.attn_norm, layer.attention.output.LayerNorm),
            (block.up, layer.intermediate.dense),
            (block.down, layer.output.dense),
            (block.mlp_norm, layer.output.LayerNorm),
        ]
    with torch.no_grad():
        for mine, other in pairs:
            if isinstance(mine, torch.nn.Module):
                for name, parameter in mine.named_parameters():
                    parameter.copy_(getattr(other, name))
            else:
                mine.copy_(other)
    return ours


@pytest.mark.parametrize("padded", [True, False])
def test_it_is_hugging_faces_bert(padded):
    torch.manual_seed(0)
    theirs = peer().double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = copied(bert_model(CONFIG).double(), theirs)
    call = batch() if padded else {"input_ids": IDS}
    logits = ours(call if padded else IDS)
    expected = theirs(**call).logits
    real = MASK.bool() if padded else torch.ones_like(MASK, dtype=torch.bool)
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-6, atol=1e-8)
    labels = IDS.masked_fill(~real, -100)
    torch.testing.assert_close(bert_loss(logits, labels), theirs(**call, labels=labels).loss, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stages", [2, 4])
def test_stages_give_the_logits_of_the_plain_model(stages):
    pipeline = PipelineModule(bert_layers(CONFIG), num_stages=stages)
    value = batch()
    for at in range(stages):
        value = pipeline.build_stage(at)(value, KEY)
    torch.testing.assert_close(value, bert_model(CONFIG)(batch()), rtol=1e-6, atol=1e-6)
    assert [pipeline.specs[at].typename for at in bert_block_indices(CONFIG)] == [BERTBlock] * 3


def test_dropping_layers_attend_to_the_kept_real_tokens_only():
    model = convert_to_random_ltd(bert_model(CONFIG).double(), "layers.3")
    layer = model.layers[3]
    layer.reserved_length = 5
    seen = []
    layer.random_ltd_layer.register_forward_hook(lambda block, args, out: seen.append((args[0], out)))
    with entered(KEY):
        loss = bert_loss(model(batch()), IDS)
    loss.backward()
    ((given, computed),) = seen
    assert given["token_mask"].shape == (3, 5)
    for row in range(3):
        real = given["token_mask"][row]
        alone = layer.random_ltd_layer({"hidden": given["hidden"][row : row + 1, real]})["hidden"]
        torch.testing.assert_close(computed["hidden"][row, real], alone[0])
    # Nothing of the last row's padding, of which a layer may keep nothing else, turns into NaN.
    assert bool(loss.isfinite())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_training_with_a_route_lowers_the_loss():
    model = bert_model(CONFIG)
    for at, part in ((2, "begin"), (3, "inside"), (4, "end")):
        model.layers[at] = RandomLayerTokenDrop(model.layers[at], 2, reserved_length=8, route=part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        inputs, labels = mask_tokens(IDS, key=step, positions=(5, 90, 17), vocab_size=50, mask_id=49, probability=0.3)
        with torch.no_grad():
            losses.append(float(bert_loss(model.eval()(inputs), labels)))
        with entered(BatchKey(seed=1, step=step, micro_batch=0, positions=(5, 90, 17))):
            bert_loss(model.train()(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0


def test_tokens_to_predict():
    ids = torch.randint(0, 1000, (400, 100), generator=torch.Generator().manual_seed(1))
    options = {"vocab_size": 1000, "mask_id": 1000, "special_ids": (7,)}
    inputs, labels = mask_tokens(ids, key=3, positions=range(400), **options)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert not bool(chosen[ids == 7].any())
    count = int(chosen.sum())
    assert abs(count / 40_000 - 0.15) < 5 * (0.15 * 0.85 / 40_000) ** 0.5
    for share, fate in (
        (0.8, inputs[chosen] == 1000),
        (0.1, inputs[chosen] == ids[chosen]),
        (0.1, (inputs[chosen] != ids[chosen]) & (inputs[chosen] < 1000)),
    ):
        assert abs(float(fate.double().mean()) - share) < 5 * (share * (1 - share) / count) ** 0.5
    part = mask_tokens(ids[10:12], key=3, positions=(10, 11), **options)
    assert torch.equal(part[0], inputs[10:12])
    assert torch.equal(part[1], labels[10:12])
    assert not torch.equal(mask_tokens(ids, key=4, positions=range(400), **options)[0], inputs)


def test_flops_are_those_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    block = BERTBlock(CONFIG)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        block({"hidden": torch.zeros(3, 12, 16)})
    assert counter.get_total_flops() == bert_layer_flops(CONFIG, 3 * 12, 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BERTConfig(**{**_shape(), "hidden_size": 18}), "hidden_size=18 is not a multiple of num_heads=4"),
        (lambda: BERTConfig(**{**_shape(), "num_layers": 0}), "num_layers must be an integer of at least 1"),
        (lambda: BERTConfig(**{**_shape(), "dropout": 1.0}), r"probability in \[0, 1\), got 1.0"),
        (lambda: BERTConfig(**{**_shape(), "mlp_ratio": 0.01}), "leaves 0 units"),
        (lambda: BERTConfig(**{**_shape(), "norm_eps": 0.0}), "norm_eps must be positive"),
        (lambda: bert_model(CONFIG)(torch.zeros(2, 3)), r"got torch.float32 of shape \(2, 3\)"),
        (lambda: bert_model(CONFIG)({"ids": IDS}), "under 'input_ids'; got None"),
        (lambda: bert_model(CONFIG)(torch.zeros(1, 13).long()), "13 tokens does not fit .* context_length=12"),
        (
            lambda: bert_model(CONFIG)({**batch(), "attention_mask": MASK[:, :5]}),
            r"real tokens, \(3, 12\); got \(3, 5\)",
        ),
        (lambda: mask_tokens(IDS, key=1, positions=(1,), vocab_size=9, mask_id=1), "each of 3 rows .* got 1 positions"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _shape():
    return {"vocab_size": 50, "num_layers": 3, "hidden_size": 16, "num_heads": 4, "context_length": 12}


def test_a_run_on_dicts_with_dropped_tokens_counts_the_flops_of_every_product():
    def batches():
        inputs, labels = mask_tokens(IDS, key=1, positions=(5, 90, 17), vocab_size=50, mask_id=49)
        while True:
            yield {"input_ids": inputs, "attention_mask": MASK}, labels

    config = {
        "train": {"global_batch_size": 3, "micro_batch_size": 3, "steps": 4},
        "data": {"sequence_length": 12},
        "random_ltd": {"min_tokens": 4, "steps": 4, "seq_per_step": 4, "protect_tokens": [7]},
        "optimizer": {"lr": 1e-2},
    }
    model = PipelineModule(bert_layers(CONFIG), loss_fn=bert_loss)
    with penstock.initialize(model, config) as engine:
        data = batches()
        losses = [engine.train_batch(data) for _ in range(4)]
        ledger = engine.ledger
    assert losses[-1] < losses[0]
    tokens = 3 * 12
    plain = 3 * bert_layer_flops(CONFIG, tokens, 12) + 2 * 16 * 16 * tokens + 2 * 16 * 50 * tokens
    assert ledger.plain["flops"] == 4 * 3 * plain
    # The middle block keeps 4, 4, 8 and 8 of 12 tokens.
    full = bert_layer_flops(CONFIG, tokens, 12)
    dropped = sum(full - bert_layer_flops(CONFIG, 3 * kept, kept) for kept in (4, 4, 8, 8))
    assert ledger.plain["flops"] - ledger.spent["flops"] == 3 * dropped
