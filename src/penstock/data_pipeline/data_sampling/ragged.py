"""Samples by the million as flat tokens and offsets, the form in which numpy works on many at once."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.windows import TokenWindows

_USUAL_LENGTH: Final = 256
_BOUNDS_CHUNK: Final = 1 << 20
_FETCH: Final = 256
_one_reader = threading.Lock()


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

    @property
    def name(self) -> str:
        """Which samples these are, for messages."""
        return f"samples {self.start} to {self.stop - 1}"


def ragged_batches(
    dataset: Any,
    start: int = 0,
    stop: int | None = None,
    *,
    batch_tokens: int,
    tokens_of: Callable[[Any], Any] | None = None,
) -> Iterator[RaggedBatch]:
    """Read samples ``start`` to ``stop`` of a dataset in order, in runs of about ``batch_tokens`` tokens.

    Indexed datasets and windows over them are read without a call per sample, and from several threads at once; any
    other dataset is asked by one thread at a time, through ``__getitems__`` where it has that.

    Args:
        dataset: Any map-style dataset.
        start: The first sample.
        stop: One past the last sample; the dataset's end if None.
        batch_tokens: How many tokens to hold at once; a single longer sample is a run of its own.
        tokens_of: From sample to its tokens. By default the sample itself; of a dictionary its ``input_ids``; of a
            tuple of arrays the first.

    Raises:
        ValueError: A sample is no one-dimensional sequence of integers.
    """
    last = len(dataset) if stop is None else stop
    if tokens_of is None and isinstance(dataset, IndexedDataset):
        yield from _indexed(dataset, start, last, batch_tokens)
    elif tokens_of is None and isinstance(dataset, TokenWindows):
        yield from _windows(dataset, start, last, batch_tokens)
    else:
        yield from _any(dataset, start, last, batch_tokens, tokens_of or default_tokens)


def sample_tokens(dataset: Any, index: int, tokens_of: Callable[[Any], Any] | None = None) -> npt.NDArray[Any]:
    """The tokens of one sample: one dimension of integers.

    Raises:
        ValueError: They are something else.
    """
    return _row(index, (tokens_of or default_tokens)(dataset[index]))


def shard_bounds(dataset: Any, shard_tokens: int) -> list[int]:
    """Cut a dataset into runs of about ``shard_tokens`` tokens: where each begins, and at last the dataset's end.

    The lengths of an indexed dataset and of windows are known; other datasets are taken for samples of 256 tokens.
    """
    count = len(dataset)
    if isinstance(dataset, IndexedDataset):
        return _indexed_bounds(dataset, shard_tokens)
    width = dataset.length + 1 if isinstance(dataset, TokenWindows) else _USUAL_LENGTH
    return [*range(0, count, max(1, shard_tokens // width)), count]


def _indexed_bounds(dataset: IndexedDataset, shard_tokens: int) -> list[int]:
    bounds: list[int] = []
    for first in range(0, len(dataset), _BOUNDS_CHUNK):
        # Empty sequences cost nothing in tokens, but their values do: count each as one token more.
        ends = np.cumsum(dataset.lengths[first : first + _BOUNDS_CHUNK].astype(np.int64) + 1)
        cuts = np.searchsorted(ends, np.arange(0, int(ends[-1]), shard_tokens), side="right")
        bounds += np.unique(cuts + first).tolist()
    return [*bounds, len(dataset)] if bounds else [0]


def _indexed(dataset: IndexedDataset, start: int, stop: int, batch_tokens: int) -> Iterator[RaggedBatch]:
    for first in range(start, stop, _BOUNDS_CHUNK):
        ends = np.cumsum(dataset.lengths[first : min(stop, first + _BOUNDS_CHUNK)].astype(np.int64) + 1)
        at = held = 0
        while at < len(ends):
            end = max(at + 1, int(np.searchsorted(ends, held + batch_tokens, side="right")))
            yield RaggedBatch(first + at, *dataset.read_range(first + at, first + end))
            at, held = end, int(ends[end - 1])


def _windows(dataset: TokenWindows, start: int, stop: int, batch_tokens: int) -> Iterator[RaggedBatch]:
    width = dataset.length + 1
    count = max(1, batch_tokens // width)
    for first in range(start, stop, count):
        tokens = dataset.batch(np.arange(first, min(first + count, stop)))
        yield RaggedBatch(first, tokens.reshape(-1), np.arange(len(tokens) + 1, dtype=np.int64) * width)


def _any(
    dataset: Any, start: int, stop: int, batch_tokens: int, tokens_of: Callable[[Any], Any]
) -> Iterator[RaggedBatch]:
    parts: list[npt.NDArray[Any]] = []
    held = 0
    for first in range(start, stop, _FETCH):
        indices = list(range(first, min(first + _FETCH, stop)))
        with _one_reader:
            samples = _fetch(dataset, indices)
            rows = [_row(index, tokens_of(sample)) for index, sample in zip(indices, samples, strict=True)]
        for index, tokens in zip(indices, rows, strict=True):
            if parts and held + len(tokens) + 1 > batch_tokens:
                yield _joined(start, parts)
                start, held, parts = index, 0, []
            # numpy would join int64 and uint64 as floats; an empty list is one already.
            parts.append(tokens.astype(np.int64) if tokens.dtype.kind != "i" else tokens)
            held += len(tokens) + 1
    if parts:
        yield _joined(start, parts)


def _fetch(dataset: Any, indices: list[int]) -> Iterable[Any]:
    """The samples; a batch that comes as a dictionary of columns is taken apart into samples."""
    many = getattr(dataset, "__getitems__", None)
    if many is None:
        return (dataset[index] for index in indices)
    found = many(indices)
    if isinstance(found, Mapping):
        names = list(found)
        found = [dict(zip(names, row, strict=True)) for row in zip(*found.values(), strict=True)]
    if len(found) != len(indices):
        raise ValueError(
            f"{type(dataset).__name__}.__getitems__ gave {len(found)} samples for {len(indices)} indices; it must give "
            "a list of samples, or a dictionary of columns"
        )
    return list(found)


def _row(index: int, tokens: Any) -> npt.NDArray[Any]:
    row = np.asarray(tokens)
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise ValueError(
            f"sample {index} is no sequence of integer tokens ({row.dtype}, shape {row.shape}); "
            "name its tokens with tokens_of"
        )
    return row


def _joined(start: int, parts: list[npt.NDArray[Any]]) -> RaggedBatch:
    return RaggedBatch(start, np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64))


def default_tokens(sample: Any) -> Any:
    """The tokens in a sample whose form says where they are."""
    if isinstance(sample, Mapping):
        if "input_ids" not in sample:
            raise ValueError(f"a sample has the fields {', '.join(map(str, sample))}; name its tokens with tokens_of")
        return sample["input_ids"]
    if isinstance(sample, tuple) and sample and (isinstance(sample[0], Mapping) or np.ndim(sample[0]) == 1):
        return default_tokens(sample[0])
    return sample
