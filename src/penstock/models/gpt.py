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
from penstock.models.vocabulary import OutputPart, VocabularyPart, part_scores
from penstock.pipe.labels import IGNORED
from penstock.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec

__all__ = ["GPT", "IGNORE_INDEX", "GPTConfig", "gpt_block_indices", "gpt_layers", "gpt_loss", "gpt_model"]

IGNORE_INDEX = IGNORED
"""A label that does not count in the loss."""


def gpt_layers(config: GPTConfig) -> list[LayerSpec]:
    """The model as specs: embedding, learned positions if any, the blocks, the final norm, the output layer.

    The first layer takes int64 token ids ``[B, S]`` or a dict (:meth:`TokenEmbedding.forward`); the last one gives
    logits ``[B, S, V]``. With ``vocabulary_parts`` embedding and output layer are several layers each
    (:mod:`penstock.models.vocabulary`), and where the dict has ``"labels"``, the last one gives losses ``[B, S]``.
    """
    embedding, head = _vocabulary(config)
    positions = [LayerSpec(LearnedPositions, config)] if config.positions == "learned" else []
    blocks = [LayerSpec(GPTBlock, config) for _ in range(config.num_layers)]
    return [*embedding, *positions, *blocks, LayerSpec(FinalNorm, config), *head]


def _vocabulary(config: GPTConfig) -> tuple[list[LayerSpec], list[LayerSpec]]:
    """The layers of the token embedding and those of the output layer."""
    parts, tied = range(config.vocabulary_parts), config.tie_embeddings
    if len(parts) == 1 and tied:
        return [TiedLayerSpec("embedding", TokenEmbedding, config)], [
            TiedLayerSpec("embedding", TokenEmbedding, config, forward_fn=tied_logits)
        ]
    if len(parts) == 1:
        return [LayerSpec(TokenEmbedding, config)], [LayerSpec(OutputHead, config)]
    if tied:
        return [TiedLayerSpec(f"embedding_{part}", VocabularyPart, config, part) for part in parts], [
            TiedLayerSpec(f"embedding_{part}", VocabularyPart, config, part, forward_fn=part_scores) for part in parts
        ]
    return [LayerSpec(VocabularyPart, config, part) for part in parts], [
        LayerSpec(OutputPart, config, part) for part in parts
    ]


def gpt_block_indices(config: GPTConfig) -> range:
    """Where the transformer blocks stand in :func:`gpt_layers`."""
    first = config.vocabulary_parts + (config.positions == "learned")
    return range(first, first + config.num_layers)


def gpt_loss(output: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross entropy in nats per token, over the labels that are not :data:`IGNORE_INDEX`.

    Args:
        output: Floating logits ``[B, S, V]``, of which the softmax runs in float32 at least; or the losses ``[B, S]``
            that a model with its vocabulary in parts gives.
        labels_BS: int64 labels, already shifted: ``labels[b, s]`` follows token ``s`` of row ``b``.

    Returns:
        A scalar; NaN if no label counts.
    """
    if output.shape == labels_BS.shape:
        counts_BS = labels_BS != IGNORE_INDEX
        return output.masked_fill(~counts_BS, 0.0).sum() / counts_BS.sum()
    if output.shape[:-1] != labels_BS.shape:
        raise ValueError(
            f"logits of shape {tuple(output.shape)} do not go with labels of shape {tuple(labels_BS.shape)}; "
            f"expected [batch, tokens, vocabulary] and [batch, tokens]"
        )
    logits = output.flatten(0, -2)
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
        """Logits ``[B, S, V]`` of int64 token ids ``[B, S]``, or of a dict; see :func:`gpt_layers`."""
        for layer in self.layers:
            value = layer(value)
        if self.config.tie_embeddings:
            output = tied_logits if self.config.vocabulary_parts == 1 else part_scores
            for part in self.layers[: self.config.vocabulary_parts]:
                value = output(part, value)
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
    return GPT(config, layers[: -config.vocabulary_parts] if config.tie_embeddings else layers)
