"""Small models, data and an engine for the loop's tests; importable by the paths in configuration files."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def make_mlp(width: int = 4, *, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1)
    )


def make_points(count: int = 20, *, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator)
    return TensorDataset(x, x.sum(dim=1, keepdim=True))


def make_numbers(count: int) -> list[float]:
    return [float(number) for number in range(count)]


class LanguageModel(nn.Module):
    """Embedding and head: enough to learn that a token follows another."""

    def __init__(self, vocab_size: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids))
        return logits


class CountingEngine:
    """Takes ``micro_batches`` batches a step and reports the mean of their first elements as the loss."""

    def __init__(self, micro_batches: int = 2) -> None:
        self.micro_batches = micro_batches
        self.calls: list[str] = []

    def _take(self, data_iter: Iterator[Any]) -> float:
        return float(sum(float(next(data_iter)) for _ in range(self.micro_batches)) / self.micro_batches)

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        self.calls.append("train")
        return torch.tensor(7.0 if data_iter is None else self._take(data_iter))

    def eval_batch(self, data_iter: Iterator[Any]) -> float:
        self.calls.append("eval")
        return self._take(data_iter)

    def predict_batch(self, data_iter: Iterator[Any]) -> list[Tensor]:
        self.calls.append("predict")
        return [torch.tensor([float(next(data_iter))], requires_grad=True) for _ in range(self.micro_batches)]
