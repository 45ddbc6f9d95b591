"""Which tokens an analysis belongs to, without reading them all."""

import hashlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from penstock._core.keys import derive, random_words
from penstock.data_pipeline.data_sampling.ragged import sample_tokens
from penstock.data_pipeline.datasets.indexed import IndexedDataset

_EVEN: Final = 64
_DRAWN: Final = 192
_TOKENS: Final = 1024


def fingerprint(dataset: Any, tokens_of: Callable[[Any], Any] | None = None) -> str:
    """A hexadecimal digest of how many samples there are and of the first tokens of some 256 of them.

    The samples are spread over the dataset, half by rule and half by lot, so another corpus, one tokenized anew, or
    windows cut elsewhere have another fingerprint; a change in a few samples need not be noticed. How the dataset is
    stored does not count: a list, a table and an indexed dataset of the same tokens have the same fingerprint.

    Args:
        dataset: Any map-style dataset of tokens.
        tokens_of: From sample to its tokens; see :func:`ragged_batches`.

    Raises:
        ValueError: A sample is no sequence of integers.
    """
    count = len(dataset)
    digest = hashlib.blake2b(f"penstock dataset of {count};".encode(), digest_size=16)
    for index in _places(count):
        if tokens_of is None and isinstance(dataset, IndexedDataset):
            row = dataset.get(index)  # of floats too
        else:
            row = sample_tokens(dataset, index, tokens_of)
        digest.update(f"{index}:{len(row)};".encode())
        head = row[:_TOKENS]
        digest.update(np.ascontiguousarray(head, dtype="<f8" if head.dtype.kind == "f" and head.size else "<i8").data)
    return digest.hexdigest()


def _places(count: int) -> list[int]:
    if count <= _EVEN + _DRAWN:
        return list(range(count))
    even = np.linspace(0, count - 1, _EVEN).astype(np.int64)
    drawn = random_words(derive("fingerprint", count), np.arange(_DRAWN)) % np.uint64(count)
    return [int(place) for place in np.union1d(even, drawn.astype(np.int64))]
