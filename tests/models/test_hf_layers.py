"""Hugging Face models cut into layers: the model's own loss and gradients, on one stage and on two."""

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import penstock
from penstock._core.batch_key import BatchKey, entered
from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop, RandomLTDScheduler, convert_to_random_ltd
from penstock.models import gpt_loss, hf_layers, hf_names, load_hf_weights
from penstock.pipe import PipelineModule
from penstock.runtime.checkpoint import Checkpoint
from support.pool import WorkerPool

transformers = pytest.importorskip("transformers")

VOCAB, ROWS, LENGTH = 50, 2, 12
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**DECODER, "tie_word_embeddings": False}),
    "llama, rope scaled": (
        "Llama",
        {**DECODER, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "mistral, window": ("Mistral", {**DECODER, "sliding_window": 4}),
    "qwen2, windows from layer 1": (
        "Qwen2",
        {
            **DECODER,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {**DECODER, "head_dim": 4, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**options)
    cls = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    return cls(config).double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, a mask with a hole, and labels as the models take them: not shifted, -100 in the hole."""
    ids_BS = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, 4:7] = 0  # later tokens would look there
    return ids_BS, mask_BS, ids_BS.masked_fill(mask_BS == 0, -100)


def own_loss(model: Any, ids_BS: Tensor, mask_BS: Tensor | None, labels_BS: Tensor) -> Tensor:
    """The model's loss in float64; its own is that of logits rounded to float32."""
    answer = model(input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BS)
    loss = torch.nn.functional.cross_entropy(answer.logits[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())
    torch.testing.assert_close(loss.float(), answer.loss.float(), rtol=1e-6, atol=0)
    return loss


def shifted(labels_BS: Tensor) -> Tensor:
    return torch.cat([labels_BS[:, 1:], torch.full((len(labels_BS), 1), -100)], dim=1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_layers_are_the_model(name: str, masked: bool) -> None:
    model = build(name)
    ids_BS, mask_BS, labels_BS = batch()
    given: Any = {"input_ids": ids_BS, "attention_mask": mask_BS} if masked else ids_BS
    expected = own_loss(model, ids_BS, mask_BS if masked else None, labels_BS)
    expected.backward()
    stage = PipelineModule(hf_layers(model), num_stages=1).build_stage(0, dtype=torch.float64)
    loss = gpt_loss(stage(given), shifted(labels_BS))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    theirs, names = dict(model.named_parameters()), hf_names(model)
    ours = dict(stage.canonical_parameters())
    assert ours.keys() == names.keys()
    assert set(names.values()) == theirs.keys()
    for canonical, own in names.items():
        torch.testing.assert_close(ours[canonical].grad, theirs[own].grad, rtol=1e-10, atol=1e-13)


def test_a_loaded_model_which_is_in_eval_mode_is_trained() -> None:
    model = build("gpt2").eval()
    stages = [PipelineModule(hf_layers(model), num_stages=2).build_stage(number) for number in range(2)]
    assert all(module.training for stage in stages for module in stage.modules())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("name", "masks"), [("llama", 1), ("gpt2", 1), ("qwen2, windows from layer 1", 2)])
def test_a_mask_is_made_once_for_the_blocks_of_a_stage(name: str, masks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    made: list[Tensor] = []

    def noted(original: Any, **arguments: Any) -> Tensor:
        made.append(original(**arguments))
        return made[-1]

    for maker in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(masking_utils, maker, partial(noted, getattr(masking_utils, maker)))
    ids_BS, mask_BS, _ = batch()
    stage = PipelineModule(hf_layers(build(name)), num_stages=1).build_stage(0, dtype=torch.float64)
    for given in (mask_BS, mask_BS.clone()):
        made.clear()
        stage({"input_ids": ids_BS, "attention_mask": given})
        assert len(made) == masks
    kept = weakref.ref(made[0])
    made.clear()
    gc.collect()
    assert kept() is None  # masks go with the values that they were made for


def job(rank: int, world_size: int, name: str, stages: int, folder: str) -> list[float]:
    """Losses of 3 steps of SGD, and a checkpoint."""
    torch.set_num_threads(1)
    ids_BS, mask_BS, labels_BS = batch()
    config = {
        "precision": "float64",
        "deadline_s": 30,
        "pipe": {"stages": stages, "schedule": "zb_h1"},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 3},
    }
    with penstock.initialize(
        PipelineModule(hf_layers(build(name)), loss_fn=gpt_loss),
        config,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
    ) as engine:
        rows = [({"input_ids": ids_BS, "attention_mask": mask_BS}, shifted(labels_BS))] * 2
        losses = [engine.train_batch(iter(rows)) for _ in range(3)]
        engine.save_checkpoint(folder)
    return losses


@pytest.mark.parametrize("name", ["qwen2, windows from layer 1", "gpt2"])
def test_two_stages_train_the_model_and_give_it_back(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    losses = pool.run(job, 2, name, 2, str(tmp_path))
    model = build(name)
    ids_BS, mask_BS, labels_BS = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = []
    for _ in range(3):
        loss = own_loss(model, ids_BS, mask_BS, labels_BS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == [pytest.approx(expected, rel=1e-12)] * 2
    assert expected[2] < expected[0]
    checkpoint = Checkpoint(tmp_path / "step_00000003")
    trained = build(name)
    tensors = {key: value for layer in checkpoint.layers for key, value in checkpoint.read_layer(layer).items()}
    load_hf_weights(trained, tensors)
    for (key, ours), theirs in zip(trained.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=key)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown model_type of a Hugging Face causal language model: 'bert'"):
        hf_layers(transformers.BertForMaskedLM(transformers.BertConfig(**DECODER | {"num_key_value_heads": 4})))
    model = build("llama")
    with pytest.raises(ValueError, match="LlamaModel has no output layer"):
        hf_layers(model.model)
    model.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match=r"model.gradient_checkpointing_disable\(\)"):
        hf_layers(model)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    with pytest.raises(ValueError, match="meta device"):
        hf_layers(empty)


def test_wrong_inputs_and_weights_are_refused() -> None:
    model = build("llama")
    first = hf_layers(model)[0]
    assert isinstance(first, torch.nn.Module)
    ids_BS, mask_BS, _ = batch()
    with pytest.raises(ValueError, match=r"got \['position_ids'\]"):
        first({"input_ids": ids_BS, "position_ids": ids_BS})
    with pytest.raises(ValueError, match=r"one for each token, \(2, 12\); got \(2, 11\)"):
        first({"input_ids": ids_BS, "attention_mask": mask_BS[:, 1:]})
    weights = {name: torch.zeros_like(dict(model.named_parameters())[own]) for name, own in hf_names(model).items()}
    with pytest.raises(ValueError, match=r"1 of the model's \d+ weights are not among .* layer_000.tokens.weight"):
        load_hf_weights(model, {name: tensor for name, tensor in weights.items() if name != "layer_000.tokens.weight"})
    with pytest.raises(ValueError, match=r"lm_head.weight: the run's layer_005.head.weight has the shape \(1,\)"):
        load_hf_weights(model, weights | {"layer_005.head.weight": torch.zeros(1)})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_that_drop_tokens_do_what_those_of_the_model_do(name: str, masked: bool) -> None:
    """Positions and padding follow the kept tokens."""
    section = {
        "total_layer_num": 3,
        "random_ltd_layer_num": 2,
        "random_ltd_layer_id": [0, 1],
        "random_ltd_schedule": {
            "min_value": 5,
            "max_value": LENGTH,
            "schedule_config": {"require_steps": 10, "seq_per_step": 1},
        },
    }
    ids_BS, mask_BS, _ = batch()
    key = BatchKey(seed=1, step=0, micro_batch=0, positions=(40, 7))
    stage = PipelineModule(hf_layers(build(name)), num_stages=1).build_stage(0, dtype=torch.float64)
    scheduler = RandomLTDScheduler(section)
    first = 2 if name == "gpt2" else 1

    def dropping(index: int, layer: torch.nn.Module) -> torch.nn.Module | None:
        if index - first not in (0, 1):
            return None
        wrapper = RandomLayerTokenDrop(layer, **scheduler.config.layer_options(index - first))
        scheduler.attach(wrapper)
        return wrapper

    stage.wrap_layers(dropping)
    blocks = "transformer.h" if name == "gpt2" else "model.layers"
    model = convert_to_random_ltd(build(name).train(), tuple(f"{blocks}.{number}" for number in range(3)), section)
    mask = mask_BS if masked else None
    with entered(key):
        expected = model(input_ids=ids_BS, attention_mask=mask).logits
        found = stage({"input_ids": ids_BS, "attention_mask": mask_BS} if masked else ids_BS)
        plain = build(name)(input_ids=ids_BS, attention_mask=mask).logits
    rows = mask_BS.bool() if masked else torch.ones_like(mask_BS).bool()
    torch.testing.assert_close(found[rows], expected[rows], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found[rows], plain[rows], rtol=1e-3)
