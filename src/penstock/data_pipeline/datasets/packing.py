"""Rows made of whole documents, and what keeps attention inside each of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock._core.documents import check_rows
from penstock.data_pipeline.datasets.bins import Bins, best_fit
from penstock.data_pipeline.datasets.collate import IGNORED
from penstock.data_pipeline.datasets.indexed import IndexedDataset

PackedRow = tuple[dict[str, Tensor], Tensor]


class PackedDocuments:
    """Documents packed into rows of one length by best fit, as a map-style dataset of training samples.

    A document of ``n`` tokens has ``n - 1`` places at which its next token is predicted; so many places it takes in a
    row. One of more places than a row is cut into rows, and its last piece is packed. Row ``i`` is a pair:

    - ``input_ids``, ``position_ids`` (from 0 in every document; they go on in a piece only from the piece's start) and
      ``document_ids`` (0, 1, ... along the row), int64 ``[length]`` each, in a dictionary;
    - labels, int64 ``[length]``: the next token, ``-100`` where the row is filled up.

    The filling is a document of its own, so that no place is without one to attend to.

    Args:
        documents: An :class:`IndexedDataset` whose sequences lie one after another.
        length: Places of a row.
        pad_token: Fills the inputs of rows that are not full.

    Attributes:
        bins: Which pieces lie in which row.

    Raises:
        ValueError: ``length`` is below 1, the sequences do not lie one after another, or no document has two tokens.
    """

    def __init__(self, documents: IndexedDataset, length: int, *, pad_token: int = 0) -> None:
        if not isinstance(documents, IndexedDataset):
            raise ValueError(
                f"packing takes an IndexedDataset, whose sequences are documents, got {type(documents).__name__}; "
                "write other data with IndexedDatasetBuilder or `penstock tokenize`; then IndexedDataset(PREFIX)"
            )
        if length < 1:
            raise ValueError(f"a row has at least 1 place, got length={length}")
        if not documents.is_contiguous or documents.dtype.kind == "f":
            raise ValueError(f"{documents.path_prefix}: packing takes whole tokens that lie one after another")
        self.source = documents
        self.length = length
        self.pad_token = pad_token
        self._starts, lengths = _pieces(documents, length)
        if not len(lengths):
            raise ValueError(f"{documents.path_prefix}: no document has two tokens, so there is nothing to predict")
        self._lengths = lengths
        self.bins: Bins = best_fit(lengths, length)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> PackedRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = int(index) % len(self)
        pieces = self.bins.items[self.bins.starts[row] : self.bins.starts[row + 1]]
        tokens = self.source.tokens
        inputs = np.full(self.length, self.pad_token, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        positions, owners = np.zeros_like(inputs), np.full_like(inputs, len(pieces))
        at = 0
        for number, piece in enumerate(pieces.tolist()):
            start, size = int(self._starts[piece]), int(self._lengths[piece])
            inputs[at : at + size] = tokens[start : start + size]
            labels[at : at + size] = tokens[start + 1 : start + size + 1]
            positions[at : at + size] = np.arange(size)
            owners[at : at + size] = number
            at += size
        positions[at:] = np.arange(self.length - at)
        fields = {"input_ids": inputs, "position_ids": positions, "document_ids": owners}
        return {name: torch.from_numpy(array) for name, array in fields.items()}, torch.from_numpy(labels)

    def __repr__(self) -> str:
        return f"PackedDocuments({len(self)} rows of {self.length}, {100 * self.bins.padding:.2f} % padding)"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.source, self.length, self.pad_token, self._starts, self._lengths, self.bins)


def cumulative_lengths(document_ids_BS: Tensor) -> tuple[Tensor, int]:
    """Where documents begin in the flattened rows, for attention kernels over sequences of varying length.

    Returns:
        ``cu_seqlens``, int32, from 0 to ``B * S``, and the longest document's length. Filling counts as a document.

    Raises:
        ValueError: The numbers are not ``[B, S]``.
    """
    check_rows(document_ids_BS)
    rows, length = document_ids_BS.shape
    changes = torch.ones_like(document_ids_BS, dtype=torch.bool)
    changes[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    starts = changes.flatten().nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([rows * length])]).to(torch.int32)
    return ends, int(ends.diff().max())


def document_mask_mod(document_ids_BS: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A ``mask_mod`` for FlexAttention: causal attention inside each document.

    Give it to ``torch.nn.attention.flex_attention.create_block_mask(mask_mod, B, None, S, S)``, whose blocks without
    any pair to attend to are skipped.

    Args:
        document_ids_BS: Of :class:`PackedDocuments`' rows, on the device of the attention.
    """

    def inside(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids_BS[batch, query] == document_ids_BS[batch, key])

    return inside


def _pieces(documents: IndexedDataset, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First token and number of places of every piece, in the order of the documents."""
    ends = np.concatenate([[0], np.cumsum(documents.lengths, dtype=np.int64)])[documents.document_indices]
    starts, places = ends[:-1], np.diff(ends) - 1
    filled = np.flatnonzero(places > 0)
    starts, places = starts[filled], places[filled]
    counts = -(-places // length)
    owner = np.repeat(np.arange(len(places)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[owner] + number * length, np.minimum(places[owner] - number * length, length)


def _reopen(
    source: IndexedDataset,
    length: int,
    pad_token: int,
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    bins: Bins,
) -> PackedDocuments:
    """A copy for a loader's worker, which need not pack anew."""
    copy = object.__new__(PackedDocuments)
    copy.source, copy.length, copy.pad_token, copy.bins = source, length, pad_token, bins
    copy._starts, copy._lengths = starts, lengths
    return copy
