"""Samples by the million as flat tokens and offsets, the form in which numpy works on many at once."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.windows import TokenWindows


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """A run of consecutive samples.

    Attributes:
        start: Number of the first sample.
        tokens: The tokens of all samples, end to end.
        offsets: Sample ``start + i`` is ``tokens[offsets[i]:offsets[i + 1]]``; int64, one more than there are samples.
    """

    start: int
    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def stop(self) -> int:
        """One past the number of the last sample."""
        return self.start + len(self)


def ragged_batches(
    dataset: Any, *, batch_tokens: int, tokens_of: Callable[[Any], Any] | None = None
) -> Iterator[RaggedBatch]:
    """Read a dataset from its first sample to its last, in runs of about ``batch_tokens`` tokens.

    Indexed datasets and windows over them are read without a call per sample.

    Args:
        dataset: Any map-style dataset.
        batch_tokens: How many tokens to hold at once; a single longer sample is a run of its own.
        tokens_of: From sample to its tokens; by default the sample itself, or its ``input_ids`` if it is a dictionary.

    Raises:
        ValueError: A sample is no one-dimensional sequence of integers.
    """
    if tokens_of is None and isinstance(dataset, IndexedDataset):
        yield from _indexed(dataset, batch_tokens)
    elif tokens_of is None and isinstance(dataset, TokenWindows):
        yield from _windows(dataset, batch_tokens)
    else:
        yield from _any(dataset, batch_tokens, tokens_of or _default_tokens)


def _indexed(dataset: IndexedDataset, batch_tokens: int) -> Iterator[RaggedBatch]:
    start = 0
    while start < len(dataset):
        # Empty sequences cost nothing in tokens, but their offsets do: count each as one token more.
        ends = np.cumsum(dataset.lengths[start : start + batch_tokens].astype(np.int64) + 1)
        stop = start + max(1, int(np.searchsorted(ends, batch_tokens, side="right")))
        yield RaggedBatch(start, *dataset.read_range(start, stop))
        start = stop


def _windows(dataset: TokenWindows, batch_tokens: int) -> Iterator[RaggedBatch]:
    width = dataset.length + 1
    count = max(1, batch_tokens // width)
    for start in range(0, len(dataset), count):
        tokens = dataset.batch(np.arange(start, min(start + count, len(dataset))))
        yield RaggedBatch(start, tokens.reshape(-1), np.arange(len(tokens) + 1, dtype=np.int64) * width)


def _any(dataset: Any, batch_tokens: int, tokens_of: Callable[[Any], Any]) -> Iterator[RaggedBatch]:
    parts: list[npt.NDArray[Any]] = []
    start, held = 0, 0
    for index in range(len(dataset)):
        tokens = np.asarray(tokens_of(dataset[index]))
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(
                f"sample {index} is no sequence of integer tokens ({tokens.dtype}, shape {tokens.shape}); "
                "name its tokens with tokens_of"
            )
        if parts and held + len(tokens) + 1 > batch_tokens:
            yield _joined(start, parts)
            start, held, parts = index, 0, []
        # numpy would join int64 and uint64 as floats; an empty list is one already.
        parts.append(tokens.astype(np.int64) if tokens.dtype.kind != "i" else tokens)
        held += len(tokens) + 1
    if parts:
        yield _joined(start, parts)


def _joined(start: int, parts: list[npt.NDArray[Any]]) -> RaggedBatch:
    return RaggedBatch(start, np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64))


def _default_tokens(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        if "input_ids" not in sample:
            raise ValueError(f"a sample has the fields {', '.join(map(str, sample))}; name its tokens with tokens_of")
        return sample["input_ids"]
    return sample
