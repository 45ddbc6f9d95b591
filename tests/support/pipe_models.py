"""Small layers that show an engine what models do: tied weights, dropout, nested values, unused outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from penstock.pipe import LayerSpec, MicroBatch, PipelineModule, TiedLayerSpec

VOCABULARY, WIDTH = 13, 8


class Embedding(nn.Module):
    """Token ids (B, S) to a nest: hidden states, positions, a mask and plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH))

    def forward(self, tokens_BS: Tensor) -> dict[str, Any]:
        hidden_BSD = self.weight[tokens_BS]
        return {
            "hidden": hidden_BSD,
            "more": (torch.arange(tokens_BS.shape[1]), [tokens_BS > 3, None, 0.5, "name"], True),
            7: hidden_BSD.mean(),
        }


class Block(nn.Module):
    """A residual layer with dropout; reads and passes on the whole nest."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        positions_S, (mask_BS, nothing, half, name), flag = value["more"]
        assert (nothing, half, name, flag) == (None, 0.5, "name", True)
        assert positions_S.dtype == torch.int64
        x_BSD = value["hidden"]
        update_BSD = self.dropout(torch.tanh(self.linear(self.norm(x_BSD))))
        x_BSD = x_BSD + half * update_BSD * mask_BS[..., None] + value[7]
        # The fourth entry of the list is a fresh non-contiguous tensor that nobody uses: it gets no gradient.
        return {
            "hidden": x_BSD,
            "more": (positions_S, [mask_BS, None, half, name], flag),
            7: x_BSD.transpose(0, 1).mean() * 0.1,
            "unused": x_BSD.transpose(1, 2),
        }


def to_logits(embedding: nn.Module, value: dict[str, Any]) -> Tensor:
    """The tied head: hidden states times the embedding's transpose, (B, S, V)."""
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return value["hidden"] @ weight.T


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())


def language_model(num_stages: int, *, dropout: float = 0.3, interval: int = 0, blocks: int = 6) -> PipelineModule:
    layers = [
        TiedLayerSpec("embedding", Embedding),
        *(LayerSpec(Block, dropout) for _ in range(blocks)),
        TiedLayerSpec("embedding", Embedding, forward_fn=to_logits),
    ]
    return PipelineModule(
        layers,
        num_stages=num_stages,
        loss_fn=cross_entropy,
        partition_method="uniform",
        activation_checkpoint_interval=interval,
    )


def batch(step: int, index: int, *, rows: int = 2) -> MicroBatch:
    """Micro-batch ``index`` of the global batch of a step; its length depends on both."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    length = 3 + (5 * index + step) % 7
    tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    positions = tuple(100 * step + rows * index + row for row in range(rows))
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], index, positions)
