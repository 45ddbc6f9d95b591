"""The reference GPT as a list of layers for a pipeline, as one plain module, and its loss.

Pre-norm, without biases, rotary or learned positions, token embedding tied to the output layer. It follows GPT-2
(Radford et al., 2019) in its shape and initialisation.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from penstock.models.gpt_config import GPTConfig
from penstock.models.gpt_modules import (
    FinalNorm,
    GPTBlock,
    LearnedPositions,
    OutputHead,
    TokenEmbedding,
    tied_logits,
)
from penstock.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec

__all__ = ["GPT", "IGNORE_INDEX", "GPTConfig", "gpt_block_indices", "gpt_layers", "gpt_loss", "gpt_model"]

IGNORE_INDEX = -100
"""A label that does not count in the loss."""


def gpt_layers(config: GPTConfig) -> list[LayerSpec]:
    """The model as specs: embedding, learned positions if any, the blocks, the final norm, the output layer.

    The first layer takes int64 token ids ``[B, S]`` or a dict (:meth:`TokenEmbedding.forward`); the last one gives
    logits ``[B, S, V]``.
    """
    if config.tie_embeddings:
        embedding: LayerSpec = TiedLayerSpec("embedding", TokenEmbedding, config, tied_weight_attr="weight")
        head: LayerSpec = TiedLayerSpec(
            "embedding", TokenEmbedding, config, forward_fn=tied_logits, tied_weight_attr="weight"
        )
    else:
        embedding, head = LayerSpec(TokenEmbedding, config), LayerSpec(OutputHead, config)
    positions = [LayerSpec(LearnedPositions, config)] if config.positions == "learned" else []
    blocks = [LayerSpec(GPTBlock, config) for _ in range(config.num_layers)]
    return [embedding, *positions, *blocks, LayerSpec(FinalNorm, config), head]


def gpt_block_indices(config: GPTConfig) -> range:
    """Where the transformer blocks stand in :func:`gpt_layers`."""
    first = 2 if config.positions == "learned" else 1
    return range(first, first + config.num_layers)


def gpt_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross entropy in nats per token, over the labels that are not :data:`IGNORE_INDEX`.

    Args:
        logits_BSV: Floating logits. The softmax runs in float32 at least.
        labels_BS: int64 labels, already shifted: ``labels[b, s]`` follows token ``s`` of row ``b``.

    Returns:
        A scalar; NaN if no label counts.
    """
    if logits_BSV.shape[:-1] != labels_BS.shape:
        raise ValueError(
            f"logits of shape {tuple(logits_BSV.shape)} do not go with labels of shape {tuple(labels_BS.shape)}; "
            f"expected [batch, tokens, vocabulary] and [batch, tokens]"
        )
    logits = logits_BSV.flatten(0, -2)
    if logits.element_size() < 4:
        logits = logits.float()
    return F.cross_entropy(logits, labels_BS.flatten(), ignore_index=IGNORE_INDEX)


class GPT(nn.Module):
    """The same layers in one plain module, for use without a pipeline; see :func:`gpt_model`.

    Args:
        config: The model's shape.
        layers: The built layers, in the order of :func:`gpt_layers`; a tied output layer is left out.
    """

    def __init__(self, config: GPTConfig, layers: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(layers)

    def forward(self, value: Any) -> Tensor:
        """Logits ``[B, S, V]`` of int64 token ids ``[B, S]``, or of a dict; see :meth:`TokenEmbedding.forward`."""
        for layer in self.layers:
            value = layer(value)
        if self.config.tie_embeddings:
            value = tied_logits(self.layers[0], value)
        assert isinstance(value, Tensor)
        return value


def gpt_model(config: GPTConfig, *, base_seed: int = 1234) -> GPT:
    """Build the GPT as one plain module.

    The weights are those that ``PipelineModule(gpt_layers(config), base_seed=base_seed)`` gives its stages, however
    many there are; torch's own generator decides nothing.

    Args:
        config: The model's shape.
        base_seed: Decides the initial weights.
    """
    stage = PipelineModule(gpt_layers(config), num_stages=1, base_seed=base_seed).build_stage(0)
    layers = [layer for _, layer in stage.canonical_modules()]
    return GPT(config, layers[:-1] if config.tie_embeddings else layers)
