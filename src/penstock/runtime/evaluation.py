"""Evaluation of an engine on held-out text."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from penstock.data_pipeline.datasets import TokenWindows
from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.tokenize import load_tokenizer
from penstock.runtime.config import TrainConfig
from penstock.runtime.engine import Engine
from penstock.runtime.heldout import HeldOut, bytes_per_token, held_out, unigram_log_probabilities


def heldout_windows(config: TrainConfig) -> TokenWindows:
    """The held-out text in windows of the run's sequence length.

    Raises:
        ValueError: The configuration names none, no sequence length, or fewer windows than one global batch.
    """
    path, length = config.data.heldout, config.sequence_length
    if path is None:
        raise ValueError("there is no held-out data: set data.heldout to a .bin/.idx prefix")
    if length is None:
        raise ValueError("held-out windows need a length: set data.sequence_length or model.context")
    windows = TokenWindows(IndexedDataset(path), length)
    if len(windows) < config.train.global_batch_size:
        raise ValueError(
            f"{path}: {len(windows)} held-out windows of {length} tokens do not fill one global batch of "
            f"{config.train.global_batch_size}; hold out more text or lower train.global_batch_size"
        )
    return windows


def heldout_loss(engine: Engine, windows: TokenWindows) -> tuple[float, npt.NDArray[np.integer[Any]]]:
    """Mean loss on the first windows that fill ``train.eval_batches`` global batches (or all, if they are fewer).

    Every rank calls it.

    Returns:
        The loss in nats per token, the same on every rank, and the tokens that were predicted.
    """
    cut = engine.parts.cut
    batches = min(engine.config.train.eval_batches, len(windows) // cut.global_batch_size)

    def pairs(batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in cut.indices():
            tokens = windows.batch(np.asarray(cut.positions(index, batch * cut.global_batch_size)))
            tokens_BT = torch.from_numpy(tokens.astype(np.int64))
            yield tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

    losses = [engine.eval_batch(pairs(batch)) for batch in range(batches)]
    labels = windows.batch(np.arange(batches * cut.global_batch_size))[:, 1:]
    return sum(losses) / len(losses), labels


def evaluate(engine: Engine, windows: TokenWindows) -> HeldOut:
    """The held-out loss beside a unigram model's, and in bits per byte. Every rank calls it."""
    loss, labels = heldout_loss(engine, windows)
    config = engine.config
    assert config.data.train is not None  # what the unigram model counts
    training = IndexedDataset(config.data.train).tokens
    vocab_size, sizes = 1 + max(int(labels.max()), _largest(training)), None
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        sizes, vocab_size = bytes_per_token(tokenizer), max(vocab_size, tokenizer.get_vocab_size())
    return held_out(loss, labels, unigram_log_probabilities(training, vocab_size), sizes)


def _largest(tokens: Any, chunk: int = 1 << 22) -> int:
    return max(int(tokens[start : start + chunk].max()) for start in range(0, len(tokens), chunk))
