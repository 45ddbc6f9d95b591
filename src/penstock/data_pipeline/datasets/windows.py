"""Fixed windows over a corpus laid end to end: what a language model is trained on."""

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.datasets.indexed import IndexedDataset

TokenArray = npt.NDArray[np.integer[Any]]
IndexArray = npt.NDArray[np.int64]


class TokenWindows:
    """Windows of ``length + 1`` tokens over the concatenated documents, as a map-style dataset.

    Window ``i`` starts at token ``i * stride``; its first ``length`` tokens are the input and its last ``length`` the
    labels, so with ``stride == length`` every token but the first is predicted exactly once. Windows run across
    document ends. The corpus stays where it lies (memory-mapped): only the windows asked for are read.

    Args:
        tokens: An :class:`IndexedDataset`, or a one-dimensional array of tokens.
        length: Tokens of a window that are predicted; at least 1.
        stride: Tokens between the starts of neighbours; ``length`` unless given.

    Attributes:
        dropped_tokens: Tokens at the end that fill no window.

    Raises:
        ValueError: ``length`` or ``stride`` is below 1, the array is not one row of integers, or the corpus is shorter
            than a window.
    """

    def __init__(self, tokens: IndexedDataset | TokenArray, length: int, stride: int | None = None) -> None:
        stride = length if stride is None else stride
        if length < 1 or stride < 1:
            raise ValueError(f"length and stride must be at least 1, got length={length}, stride={stride}")
        self.source = tokens
        self.length = length
        self.stride = stride
        self._flat = _flat_tokens(tokens)
        total = len(self._flat)
        if total < length + 1:
            raise ValueError(
                f"the corpus holds {total} tokens, fewer than one window of {length} + 1; shorten the windows or "
                "add text"
            )
        every = np.lib.stride_tricks.sliding_window_view(self._flat, length + 1)
        self._windows_NT = every[::stride]
        self.dropped_tokens = total - ((len(self) - 1) * stride + length + 1)

    def __len__(self) -> int:
        return len(self._windows_NT)

    def __getitem__(self, index: int) -> TokenArray:
        """Window ``index``: ``length + 1`` tokens in the corpus's dtype, a read-only view."""
        _check_number(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window: TokenArray = self._windows_NT[index]
        return window

    def __iter__(self) -> Iterator[TokenArray]:
        return iter(self._windows_NT)

    def batch(self, indices: npt.ArrayLike) -> TokenArray:
        """Several windows at once: a fresh array ``(number of indices, length + 1)`` in the corpus's dtype."""
        return self._windows_NT[np.asarray(indices, dtype=np.int64)]

    def __getitems__(self, indices: list[int]) -> TokenArray:
        """What torch's DataLoader asks for: a whole batch in one call."""
        for index in indices:
            _check_number(index)
        return self.batch(indices)

    def document_ids(self, indices: npt.ArrayLike) -> IndexArray:
        """For every token of the windows named, the number of its document: int64, a last axis of ``length + 1``.

        Raises:
            IndexError: There is no such window.
            ValueError: The windows lie over a plain array, which knows no documents.
        """
        if not isinstance(self.source, IndexedDataset):
            raise ValueError("windows over a plain array know no documents; give an IndexedDataset")
        numbers = np.asarray(indices, dtype=np.int64)
        beyond = numbers[(numbers < -len(self)) | (numbers >= len(self))]
        if beyond.size:
            raise IndexError(f"window {beyond[0]} of {len(self)}")
        starts = (numbers % len(self))[..., None] * self.stride
        places = starts + np.arange(self.length + 1, dtype=np.int64)
        return np.searchsorted(_document_ends(self.source), places, side="right").astype(np.int64)

    def __reduce__(self) -> tuple[type["TokenWindows"], tuple[IndexedDataset | TokenArray, int, int]]:
        # A loader's worker rebuilds the view; pickling it would copy the corpus.
        return TokenWindows, (self.source, self.length, self.stride)

    def __repr__(self) -> str:
        return f"TokenWindows({len(self)} windows of {self.length} + 1, stride {self.stride})"


def _flat_tokens(source: Any) -> TokenArray:
    """The source's tokens as one row, without copying."""
    if isinstance(source, IndexedDataset):
        if not source.is_contiguous:
            raise ValueError(
                f"the sequences of {source.path_prefix} do not lie one after another, so they are no stream to cut "
                "windows from; write them anew with IndexedDatasetBuilder"
            )
        flat = source.tokens[: int(source.lengths.sum(dtype=np.int64))]
    elif isinstance(source, np.ndarray):
        flat = source
    else:
        raise ValueError(
            f"windows need an IndexedDataset or a one-dimensional array of tokens, got {type(source).__name__}"
        )
    if flat.ndim != 1 or not np.issubdtype(flat.dtype, np.integer):
        raise ValueError(f"windows need one row of integer tokens, got shape {flat.shape} of {flat.dtype}")
    return flat


def _document_ends(source: IndexedDataset) -> IndexArray:
    """One past the last token of each document, in the stream."""
    starts = np.concatenate([[0], np.cumsum(source.lengths, dtype=np.int64)])
    return np.asarray(starts[source.document_indices[1:]], dtype=np.int64)


def _check_number(index: Any) -> None:
    try:
        operator.index(index)
    except TypeError:
        raise TypeError(
            f"a window is named by one whole number, got {type(index).__name__}; take several with batch(indices). "
            "A sampler that yields whole batches is a DataLoader's batch_sampler=, not its sampler="
        ) from None
