"""Causal language models of Hugging Face's transformers as lists of layers for a pipeline.

The layers hold the model's own modules, so they compute what it computes, with its attention implementation. Between
layers goes a dict ``{"hidden": x_BSD, "position_ids": p_BS}``, with ``"attention_mask"`` ``[B, S]`` where one is given.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from penstock._core.suggest import unknown_name
from penstock.pipe.layer_spec import TiedLayerSpec

FAMILIES: Final = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Values of ``model.config.model_type`` whose forward pass is the one that these layers make."""

_OLDEST: Final = 5

HFValue = dict[str, Tensor]

_MASKS: Final = WeakTensorKeyDictionary()
"""For each tensor of positions, as long as it lives, the masks that were made for it."""


def hf_layers(model: Any) -> list[nn.Module | TiedLayerSpec]:
    """Cut a causal language model into layers: embedding, (learned positions), blocks, final norm, output layer.

    The first layer takes int64 token ids ``[B, S]``, or a dict with them under ``"input_ids"`` and perhaps
    ``"attention_mask"`` ``[B, S]`` (1 for tokens, 0 for padding); the last gives logits ``[B, S, V]``. Labels are
    shifted already: ``penstock.models.gpt_loss`` on them is the model's own loss.

    Args:
        model: A ``GPT2LMHeadModel``, ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM`` or
            ``Qwen3ForCausalLM``, with its weights, the same on every rank. It is not changed: a stage holds copies of
            its own layers.

    Returns:
        What :class:`penstock.pipe.PipelineModule` takes. Tied embeddings are tied there too.

    Raises:
        ValueError: Another kind of model, one that recomputes activations itself, or one on the meta device.
    """
    _check_version()
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(unknown_name("model_type of a Hugging Face causal language model:", str(family), FAMILIES))
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output layer; take the model for causal language modelling")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "the model recomputes activations itself; call model.gradient_checkpointing_disable() and set "
            "pipe.activation_checkpoint_interval: 1, which recomputes them once and goes with every schedule"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model lies on the meta device and has no weights to copy; load or initialise it first")
    embedding: nn.Module = model.get_input_embeddings()
    first: nn.Module | TiedLayerSpec = HFEmbedding(embedding)
    last: nn.Module | TiedLayerSpec = HFHead(head)
    if head.weight is embedding.weight:
        first = TiedLayerSpec("embedding", HFEmbedding, embedding, tied_weight_attr="tokens.weight")
        last = TiedLayerSpec(
            "embedding", HFEmbedding, embedding, tied_weight_attr="tokens.weight", forward_fn=_tied_logits
        )
    body = model.base_model
    if family == "gpt2":
        positions: list[nn.Module] = [HFPositions(body.wpe, body.drop)]
        blocks: list[nn.Module] = [HFGPT2Block(block, config) for block in body.h]
        layers = [first, *positions, *blocks, HFNorm(body.ln_f), last]
    else:
        blocks = [
            HFBlock(block, body.rotary_emb, config, sliding=_slides(config, number))
            for number, block in enumerate(body.layers)
        ]
        layers = [first, *blocks, HFNorm(body.norm), last]
    for layer in layers:
        if isinstance(layer, nn.Module):
            layer.training = model.training  # the wrapper alone: what is inside is the model's own
    return layers


class HFEmbedding(nn.Module):
    """Token ids to vectors.

    Args:
        tokens: The model's ``nn.Embedding``.
    """

    def __init__(self, tokens: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, value: Tensor | HFValue) -> HFValue:
        """Look int64 ids ``[B, S]`` up; see :func:`hf_layers`."""
        given = dict(value) if isinstance(value, dict) else {"input_ids": value}
        ids_BS = given.pop("input_ids", None)
        mask_BS = given.pop("attention_mask", None)
        if ids_BS is None or ids_BS.dim() != 2 or given:
            raise ValueError(
                "the first layer of a Hugging Face model takes token ids [batch, tokens], or a dict with input_ids and "
                f"perhaps attention_mask; got {sorted(given) or 'no ids of two dimensions'}"
            )
        if mask_BS is not None and mask_BS.shape != ids_BS.shape:
            raise ValueError(
                f"attention_mask must be one for each token, {tuple(ids_BS.shape)}; got {tuple(mask_BS.shape)}"
            )
        positions_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
        out = {"hidden": self.tokens(ids_BS), "position_ids": positions_BS}
        return out if mask_BS is None else {**out, "attention_mask": mask_BS}


class HFPositions(nn.Module):
    """GPT-2's learned positions, and its dropout of embeddings.

    Args:
        positions: ``wpe``.
        dropout: ``drop``.
    """

    def __init__(self, positions: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.positions = positions
        self.dropout = dropout

    def forward(self, value: HFValue) -> HFValue:
        """Add a vector for each position."""
        return {**value, "hidden": self.dropout(value["hidden"] + self.positions(value["position_ids"]))}


class HFBlock(nn.Module):
    """A decoder layer with rotary positions.

    Args:
        block: The model's layer.
        rotary: What gives cosines and sines of positions.
        config: The model's.
        sliding: Whether attention sees a window of ``config.sliding_window`` tokens only; where tokens are dropped, of
            those that are kept.
    """

    def __init__(self, block: nn.Module, rotary: nn.Module, config: Any, *, sliding: bool) -> None:
        super().__init__()
        self.block = block
        self.rotary = rotary
        self.config = config
        self.sliding = sliding

    def forward(self, value: HFValue) -> HFValue:
        """Update ``value["hidden"]``; the other entries pass through."""
        x_BSD, positions_BS = value["hidden"], value["position_ids"]
        y_BSD = self.block(
            x_BSD,
            attention_mask=_causal_mask(self.config, value, sliding=self.sliding),
            position_ids=positions_BS,
            position_embeddings=self.rotary(x_BSD, positions_BS),
            past_key_values=None,
            use_cache=False,
        )
        return {**value, "hidden": y_BSD}


class HFGPT2Block(nn.Module):
    """A layer of GPT-2.

    Args:
        block: The model's layer.
        config: The model's.
    """

    def __init__(self, block: nn.Module, config: Any) -> None:
        super().__init__()
        self.block = block
        self.config = config

    def forward(self, value: HFValue) -> HFValue:
        """Update ``value["hidden"]``; the other entries pass through."""
        mask = _causal_mask(self.config, value, sliding=False)
        return {**value, "hidden": self.block(value["hidden"], attention_mask=mask, use_cache=False)}


class HFNorm(nn.Module):
    """The last normalisation; only the hidden states leave it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, value: HFValue) -> Tensor:
        """``[B, S, D]``."""
        normed_BSD: Tensor = self.norm(value["hidden"])
        return normed_BSD


class HFHead(nn.Module):
    """The output layer of a model whose embeddings are not tied."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Logits ``[B, S, V]``."""
        logits_BSV: Tensor = self.head(x_BSD)
        return logits_BSV


def _check_version() -> None:
    """Refuse transformers in which layers are called otherwise."""
    from transformers import __version__

    if int(__version__.split(".")[0]) < _OLDEST:
        raise ValueError(
            f"hf_layers needs transformers {_OLDEST} or later, whose layers return hidden states alone; this is "
            f"{__version__}: pip install 'transformers>={_OLDEST}'"
        )


def _tied_logits(embedding: nn.Module, x_BSD: Tensor) -> Tensor:
    return F.linear(x_BSD, embedding.get_parameter("tokens.weight"))


def _slides(config: Any, number: int) -> bool:
    """Whether a layer's attention is a sliding window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return bool(kinds[number] == "sliding_attention")
    return config.model_type == "mistral" and config.sliding_window is not None


def _causal_mask(config: Any, value: HFValue, *, sliding: bool) -> Any:
    """The mask in the form that the configured attention takes, made once for all blocks that get the same tensors.

    A mask of ``[B, 1, S, S]`` that attention keeps for its backward pass is then kept once for a stage and not by each
    block. Where tokens are dropped, blocks get other tensors, and masks of their own.
    """
    x_BSD, mask_BS, positions_BS = value["hidden"], value.get("attention_mask"), value["position_ids"]
    if torch.compiler.is_compiling():  # what is compiled computes from its inputs alone
        return _made_mask(config, x_BSD, mask_BS, sliding=sliding)
    made: dict[Any, Any] = _MASKS.setdefault(positions_BS, {})
    kind = (sliding, x_BSD.dtype)  # of one pass of one model, whose layers have copies of its configuration
    of, mask = made.get(kind, (None, None))
    if kind not in made or of is not mask_BS:
        mask = _made_mask(config, x_BSD, mask_BS, sliding=sliding)
        made[kind] = mask_BS, mask
    return mask


def _made_mask(config: Any, x_BSD: Tensor, mask_BS: Tensor | None, *, sliding: bool) -> Any:
    """Make a mask.

    Positions are not told: where tokens are dropped they jump, which transformers would read as documents packed in a
    row.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    make = create_sliding_window_causal_mask if sliding else create_causal_mask
    return make(config=config, inputs_embeds=x_BSD, attention_mask=mask_BS, past_key_values=None)
