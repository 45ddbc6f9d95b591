"""Hugging Face models, of tiny configurations and random weights, with layers that drop tokens."""

import copy
import inspect

import pytest
import torch
from torch import nn

from penstock._core.batch_key import BatchKey, entered
from penstock.data_pipeline.random_ltd import (
    RandomLayerTokenDrop,
    convert_to_random_ltd,
    describe_random_ltd,
    remove_random_ltd,
    save_without_random_ltd,
)
from penstock.data_pipeline.random_ltd.choice import draw_tokens

transformers = pytest.importorskip("transformers")

ROWS, LENGTH, KEPT = 2, 12, 5
DECODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, **NO_DROPOUT}
MODELS = {
    "Llama": ("LlamaForCausalLM", DECODER, "model.layers"),
    "Qwen2": (
        "Qwen2ForCausalLM",
        {**DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        "model.layers",
    ),
    "Qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 4}, "model.layers"),
    "GPT2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 50,
            "n_embd": 16,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "transformer.h",
    ),
    "Bert": ("BertForMaskedLM", {"vocab_size": 50, **ENCODER}, "bert.encoder.layer"),
    "ViT": ("ViTForImageClassification", {"image_size": 12, "patch_size": 4, **ENCODER}, "vit.layers"),
}
IDS = torch.randint(0, 50, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[1] * LENGTH, [1] * (LENGTH - 3) + [0] * 3])
KEY = BatchKey(seed=1, step=0, micro_batch=0, positions=(40, 7))


def build(name, attention="sdpa"):
    torch.manual_seed(0)
    model, config, layers = MODELS[name]
    made = getattr(transformers, model)(getattr(transformers, f"{name}Config")(**config)).train()
    made.set_attn_implementation(attention)
    # In float64 the eager attention of transformers, which softens in float32, gives NaN for rows of padding.
    made = made.double() if attention == "sdpa" else made
    return made, layers


def section(route="layer", ids=(1, 2)):
    return {
        "total_layer_num": 4,
        "random_ltd_layer_num": len(ids),
        "random_ltd_layer_id": list(ids),
        "random_ltd_schedule": {
            "min_value": KEPT,
            "max_value": LENGTH,
            "schedule_config": {"require_steps": 10, "seq_per_step": 1},
        },
        "route": route,
    }


def converted(model, layers, route="layer"):
    return convert_to_random_ltd(model, tuple(f"{layers}.{at}" for at in range(4)), section(route))


def batch(name, packed=False):
    if name == "ViT":
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(ROWS, 3, 12, 12, dtype=torch.float64, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    if packed:
        positions = torch.tensor([[*range(5), *range(7)], [*range(2), *range(8), *range(2)]])
        return {"input_ids": IDS, "position_ids": positions, "labels": IDS, "use_cache": False}
    return {"input_ids": IDS, "attention_mask": PADDING, "labels": IDS}


def gradients(model, call):
    model.zero_grad()
    with entered(KEY):
        loss = model(**call).loss
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


class Restricted(nn.Module):
    """The full layer with attention restricted to the kept tokens; the other tokens pass by afterwards."""

    def __init__(self, layer, layer_id, causal):
        super().__init__()
        self.layer = layer
        self.layer_id = layer_id
        self.causal = causal

    def forward(self, *args, **kwargs):
        call = inspect.signature(self.layer.forward).bind(*args, **kwargs)
        hidden = call.arguments["hidden_states"]
        rows, length = hidden.shape[:2]
        indices = draw_tokens(self.layer_id, rows, length, KEPT, hidden.device).long()
        kept = torch.zeros(rows, length, dtype=torch.bool).scatter_(1, indices, True)
        mask = call.arguments.get("attention_mask")
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool)
            mask = mask.tril() if self.causal else mask
        lowest = torch.finfo(hidden.dtype).min
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, lowest)
        call.arguments["attention_mask"] = mask.expand(rows, 1, length, length).masked_fill(
            ~kept[:, None, None], lowest
        )
        call.arguments.pop("past_key_values", None)
        out = self.layer(*call.args, **call.kwargs)
        return torch.where(kept[..., None], out, hidden)


def reference(name, attention, route):
    """The plain model with middle layers replaced by restricted ones."""
    model, path = build(name, attention)
    layers = model.get_submodule(path)
    for at in (1, 2):
        layers[at] = Restricted(layers[at], 1 if route == "block" else at, causal=name not in ("Bert", "ViT"))
    return model


CASES = [
    *((name, "sdpa", "layer", False) for name in MODELS),
    *((name, "eager", "block", False) for name in MODELS),
    ("Llama", "sdpa", "layer", True),
    ("Llama", "eager", "block", True),
    ("Qwen2", "sdpa", "block", True),
]


@pytest.mark.parametrize(("name", "attention", "route", "packed"), CASES)
def test_a_layer_on_kept_tokens_is_the_full_layer_with_attention_restricted_to_them(name, attention, route, packed):
    """Positions, masks and packed documents are right when logits, loss and every gradient of the model agree."""
    call = batch(name, packed)
    model = converted(*build(name, attention), route)
    ours, theirs = gradients(model, call), gradients(reference(name, attention, route), call)
    dropping = [layer for layer in model.modules() if isinstance(layer, RandomLayerTokenDrop)]
    assert [layer.computed_tokens for layer in dropping] == [ROWS * KEPT] * 2
    assert len(ours) == len(theirs)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if attention == "sdpa" else {"rtol": 1e-4, "atol": 1e-6}
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, **tolerance)
    plain = gradients(build(name, attention)[0], call)
    assert not torch.allclose(plain[0], ours[0], rtol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_names_of_a_state_dict_and_eval_are_those_of_the_original(name):
    original, path = build(name)
    model = converted(copy.deepcopy(original), path)
    state = save_without_random_ltd(model)
    assert list(state) == list(original.state_dict())
    build(name)[0].load_state_dict(state, strict=True)
    call = batch(name)
    with torch.no_grad():
        expected = original.eval()(**call).loss
        assert torch.equal(model.eval()(**call).loss, expected)
        assert torch.equal(remove_random_ltd(model)(**call).loss, expected)
    assert "RandomLayerTokenDrop" not in repr(model)


@pytest.mark.parametrize(
    ("name", "route"), [("Llama", "layer"), ("Llama", "block"), ("GPT2", "block"), ("ViT", "layer")]
)
def test_gradient_checkpointing_changes_nothing(name, route):
    model = converted(*build(name), route)
    plain = gradients(model, batch(name))
    model.activation_checkpointing_enable()
    for ours, expected in zip(gradients(model, batch(name)), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_two_micro_batches_in_flight():
    model = converted(*build("Llama"), "block")
    losses = []
    for positions in ((40, 7), (3, 4)):
        with entered(BatchKey(seed=1, step=0, micro_batch=0, positions=positions)):
            losses.append(model(**batch("Llama")).loss)
    for loss in reversed(losses):
        loss.backward()
    together = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    for positions in ((40, 7), (3, 4)):
        with entered(BatchKey(seed=1, step=0, micro_batch=0, positions=positions)):
            model(**batch("Llama")).loss.backward()
    torch.testing.assert_close(together, model.model.embed_tokens.weight.grad, rtol=1e-12, atol=1e-14)


def test_protected_tokens_reach_the_layers_through_the_model():
    model, path = build("Llama")
    convert_to_random_ltd(model, f"{path}.1")
    model.get_submodule(path)[1].reserved_length = KEPT
    marked = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    marked[:, [0, 4, 11]] = True
    seen = []
    model.get_submodule(path)[1].random_ltd_layer.register_forward_hook(
        lambda layer, args, kwargs, out: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model(input_ids=IDS, protected_tokens=marked)
    for row in seen[0].tolist():
        assert {0, 4, 11} <= set(row)
        assert len(row) == KEPT


def test_a_filled_cache_is_refused():
    model = converted(*build("Llama"))
    cache = model.eval()(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="DynamicCache that holds 12 tokens"):
        model.train()(input_ids=IDS, past_key_values=cache)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model():
    torch._dynamo.reset()
    model = converted(*build("Llama"))
    plain = gradients(model, batch("Llama"))
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    with entered(KEY):
        loss = compiled(**batch("Llama")).loss
        loss.backward()
    ours = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_the_table_of_a_llama_layer():
    assert describe_random_ltd(converted(*build("Llama"))).splitlines() == [
        "model.layers.1: LlamaDecoderLayer, keeps 5 tokens of each row",
        "model.layers.2: LlamaDecoderLayer, keeps 5 tokens of each row",
        "argument             kind           by",
        "hidden_states        hidden states",
        "attention_mask       mask           name",
        "position_ids         positions      name",
        "past_key_values      cache          name",
        "use_cache            by shape",
        "position_embeddings  rotary         name",
    ]
