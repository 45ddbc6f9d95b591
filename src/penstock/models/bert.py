"""The reference BERT as a list of layers for a pipeline, as one plain module, and its loss.

Post-norm, with biases, trained positions and segments, the token embedding tied to the output layer (Devlin et al.,
"BERT", arXiv:1810.04805), with the masked-token head and no other.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penstock._core.keys import derive, random_floats, random_words
from penstock.models.bert_config import BERTConfig
from penstock.models.bert_modules import BERTBlock, BERTOutputBias, BERTPositions, BERTTokens, BERTTransform
from penstock.models.gpt import IGNORE_INDEX, gpt_loss
from penstock.models.gpt_modules import tied_logits
from penstock.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec

__all__ = ["BERT", "BERTConfig", "bert_block_indices", "bert_layers", "bert_loss", "bert_model", "mask_tokens"]


def bert_layers(config: BERTConfig) -> list[LayerSpec]:
    """The model as specs: embedding, positions, the blocks, the head's transform, the tied output layer, its bias.

    The first layer takes int64 token ids ``[B, S]`` or a dict (:meth:`BERTTokens.forward`); the last one gives logits
    ``[B, S, V]``.
    """
    embedding = TiedLayerSpec("embedding", BERTTokens, config, tied_weight_attr="weight")
    output = TiedLayerSpec("embedding", BERTTokens, config, forward_fn=tied_logits, tied_weight_attr="weight")
    blocks = [LayerSpec(BERTBlock, config) for _ in range(config.num_layers)]
    head = [LayerSpec(BERTTransform, config), output, LayerSpec(BERTOutputBias, config)]
    return [embedding, LayerSpec(BERTPositions, config), *blocks, *head]


def bert_block_indices(config: BERTConfig) -> range:
    """Where the transformer blocks stand in :func:`bert_layers`."""
    return range(2, 2 + config.num_layers)


def bert_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross entropy in nats over the masked tokens: the labels that are not ``IGNORE_INDEX`` (-100).

    Args:
        logits_BSV: Floating logits. The softmax runs in float32 at least.
        labels_BS: int64; from :func:`mask_tokens`.

    Returns:
        A scalar; NaN if no label counts.
    """
    return gpt_loss(logits_BSV, labels_BS)


class BERT(nn.Module):
    """The same layers in one plain module, for use without a pipeline; see :func:`bert_model`.

    Args:
        layers: The built layers, in the order of :func:`bert_layers`, without the tied output layer.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, value: Any) -> Tensor:
        """Logits ``[B, S, V]`` of int64 token ids ``[B, S]``, or of a dict; see :meth:`BERTTokens.forward`."""
        for layer in self.layers[:-1]:
            value = layer(value)
        logits: Tensor = self.layers[-1](tied_logits(self.layers[0], value))
        return logits


def bert_model(config: BERTConfig, *, base_seed: int = 1234) -> BERT:
    """Build the BERT as one plain module.

    The weights are those that ``PipelineModule(bert_layers(config), base_seed=base_seed)`` gives its stages.

    Args:
        config: The model's shape.
        base_seed: Decides the initial weights.
    """
    stage = PipelineModule(bert_layers(config), num_stages=1, base_seed=base_seed).build_stage(0)
    layers = [layer for _, layer in stage.canonical_modules()]
    return BERT([*layers[:-2], layers[-1]])


def mask_tokens(
    input_ids_BS: Tensor,
    *,
    key: int,
    positions: Sequence[int],
    vocab_size: int,
    mask_id: int,
    special_ids: Sequence[int] = (),
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Choose tokens to be predicted and hide them: 80 % become the mask, 10 % a random token, 10 % stay as they are.

    The choice is a function of the key and each row's position in the run's order, whatever the batches.

    Args:
        input_ids_BS: int64 token ids on the CPU.
        key: A 64-bit key; another one for another epoch.
        positions: Each row's sample position, B integers.
        vocab_size: Random tokens are drawn from ``0 .. vocab_size - 1``.
        mask_id: The mask's id.
        special_ids: Ids that are never chosen.
        probability: A token's chance to be chosen.

    Returns:
        The ids with some hidden, and labels: the ids that were chosen, elsewhere -100. Both int64 ``[B, S]``.
    """
    rows, length = input_ids_BS.shape
    if len(positions) != rows or not 0.0 < probability < 1.0:
        raise ValueError(
            f"expected one position for each of {rows} rows and a probability in (0, 1), got {len(positions)} "
            f"positions and {probability}"
        )
    at = np.arange(length)
    keys = [derive(key, "mask_tokens", position) for position in positions]
    chosen = torch.from_numpy(np.stack([random_floats(one, at) for one in keys])) < probability
    if special_ids:
        chosen &= ~torch.isin(input_ids_BS, torch.tensor(special_ids))
    fate = torch.from_numpy(np.stack([random_floats(one, at + length) for one in keys]))
    words = np.stack([random_words(one, at + 2 * length) % np.uint64(vocab_size) for one in keys])
    hidden = torch.where(fate < 0.8, mask_id, torch.from_numpy(words.astype(np.int64)))
    hidden = torch.where(fate < 0.9, hidden, input_ids_BS)
    return torch.where(chosen, hidden, input_ids_BS), torch.where(chosen, input_ids_BS, IGNORE_INDEX)
