"""Evaluation of an engine on held-out text."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from penstock.data_pipeline.configuration import validate_config
from penstock.data_pipeline.data_sampling.mixture import MixtureConfig
from penstock.data_pipeline.datasets import TokenWindows, open_dataset
from penstock.data_pipeline.datasets.indexed import IndexedDataset, idx_path
from penstock.data_pipeline.datasets.remote import is_remote, remote_is_pair
from penstock.data_pipeline.datasets.tables import TableColumn
from penstock.data_pipeline.datasets.tokenize import load_tokenizer
from penstock.runtime.config import TrainConfig
from penstock.runtime.engine import Engine
from penstock.runtime.heldout import HeldOut, bytes_per_token, held_out, unigram_log_probabilities

_CHUNK: Final = 1 << 22
_ROWS: Final = 4096


def heldout_windows(config: TrainConfig) -> TokenWindows:
    """The held-out text in windows of the run's sequence length; the rows of a table are laid end to end.

    Raises:
        ValueError: The configuration names none, no sequence length, fewer windows than one global batch, or something
            else than tokens.
    """
    path, length = config.data.heldout, config.sequence_length
    if path is None:
        raise ValueError("there is no held-out data: set data.heldout to a dataset of tokens")
    if length is None:
        raise ValueError("held-out windows need a length: set data.sequence_length or model.context")
    windows = TokenWindows(_token_stream(path, config.data.column), length)
    if len(windows) < config.train.global_batch_size:
        raise ValueError(
            f"{path}: {len(windows)} held-out windows of {length} tokens do not fill one global batch of "
            f"{config.train.global_batch_size}; hold out more text or lower train.global_batch_size"
        )
    return windows


def _token_stream(path: str, column: str | None) -> IndexedDataset | npt.NDArray[np.integer[Any]]:
    """All tokens of a dataset one after another: mapped where they lie so, else in memory."""
    # The column is the training table's too, and one of the two may be no table.
    pair = remote_is_pair(path) if is_remote(path) else idx_path(path).is_file()
    dataset = open_dataset(path, column=None if pair or path.endswith(".npy") else column)
    if isinstance(dataset, TableColumn) and dataset.is_tokens:
        return np.concatenate([np.empty(0, dtype=np.uint8), *dataset.streams()])
    if isinstance(dataset, np.ndarray):
        return dataset.reshape(-1)
    if not isinstance(dataset, IndexedDataset):
        raise ValueError(f"{path}: held-out data is tokens, which {dataset!r} is not; tokenize it: penstock tokenize")
    return dataset


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


def evaluate(engine: Engine, windows: TokenWindows, config: TrainConfig | None = None) -> HeldOut:
    """The held-out loss beside a unigram model's, and in bits per byte. Every rank calls it.

    Args:
        engine: The engine.
        windows: From :func:`heldout_windows`.
        config: Of the run that trained the model, whose training data the unigram model counts; None for the engine's.
    """
    loss, labels = heldout_loss(engine, windows)
    config = engine.config if config is None else config
    vocab_size, sizes = 1 + int(labels.max()), None
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        sizes, vocab_size = bytes_per_token(tokenizer), max(vocab_size, tokenizer.get_vocab_size())
    counts = training_counts(config, vocab_size)
    return held_out(loss, labels, unigram_log_probabilities(counts), sizes)


def training_counts(config: TrainConfig, vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each token stands in the training text; of a mixture, each corpus by its share at the run's end.

    Args:
        config: A configuration with ``data.train``: ``.bin/.idx``, or a table of rows of tokens.
        vocab_size: Least length of the result, which is as long as the largest token wants.

    Raises:
        ValueError: The training data does not hold tokens.
    """
    train = config.data.train
    if not isinstance(train, dict):
        assert train is not None
        return _counts(train, config.data.column, vocab_size)
    mixture = validate_config(MixtureConfig, config.sampling["mixture"], "sampling.mixture")
    found = {name: _counts(path, config.data.column, vocab_size) for name, path in train.items()}
    weights = {name: corpus.weight_at(mixture.places[-1]) for name, corpus in mixture.corpora.items()}
    total = max(int(counts.sum()) for counts in found.values())
    result = np.zeros(max(map(len, found.values())), dtype=np.int64)
    for name, counts in found.items():
        scaled = counts * (weights[name] / sum(weights.values()) * total / max(1, int(counts.sum())))
        result[: len(counts)] += np.rint(scaled).astype(np.int64)
    return result


def _counts(path: str, column: str | None, vocab_size: int) -> npt.NDArray[np.int64]:
    dataset = open_dataset(path, column=column)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in _pieces(dataset, path):
        here = np.bincount(tokens.astype(np.int64), minlength=len(counts))
        here[: len(counts)] += counts
        counts = here.astype(np.int64)
    return counts


def _pieces(dataset: Any, path: str) -> Iterator[npt.NDArray[np.integer[Any]]]:
    """All tokens, in pieces of a bounded size."""
    if isinstance(dataset, IndexedDataset):
        for start in range(0, len(dataset.tokens), _CHUNK):
            yield dataset.tokens[start : start + _CHUNK]
        return
    for start in range(0, len(dataset), _ROWS):
        rows = [np.asarray(dataset[row]).reshape(-1) for row in range(start, min(start + _ROWS, len(dataset)))]
        if any(row.dtype.kind not in "iu" for row in rows):
            raise ValueError(f"{path}: evaluation counts the training data's tokens, but its rows are not tokens")
        yield np.concatenate(rows)
