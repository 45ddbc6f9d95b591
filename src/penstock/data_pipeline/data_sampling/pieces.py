"""Documents cut into training samples of their own lengths, none of which holds tokens of two documents.

``longest`` cuts a document into pieces of the longest length and a rest. ``powers`` cuts it into pieces whose lengths
are powers of two, largest first, so that batches of one length have no padding: the dataset decomposition of Pouransari
et al. (NeurIPS 2024). Their shortest pieces are left out of training; here every token that has one before it is
predicted exactly once.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.datasets.indexed import IndexedDataset


class DocumentPieces:
    """Pieces of documents as a map-style dataset; a piece that predicts ``n`` tokens has ``n + 1``.

    Takes 12 bytes of memory per piece. Documents of a single token, which predicts nothing, give no piece.

    Args:
        documents: The sequences of this dataset are the documents.
        length: Most tokens that a piece predicts; for ``powers`` a power of two.
        cut: ``longest`` or ``powers``.

    Attributes:
        lengths: Tokens of each piece, one more than it predicts; int32.

    Raises:
        ValueError: The length is below 1 or no power of two, or no document has two tokens.
    """

    def __init__(self, documents: IndexedDataset, length: int, cut: Literal["longest", "powers"] = "longest") -> None:
        if length < 1 or (cut == "powers" and length & (length - 1)):
            wanted = "a power of two" if cut == "powers" else "at least 1"
            raise ValueError(f"the longest piece must be {wanted}, got length={length}")
        self.source, self.length, self.cut = documents, length, cut
        predicted = np.maximum(documents.lengths.astype(np.int64) - 1, 0)
        sizes = [length] + ([1 << bit for bit in reversed(range(length.bit_length() - 1))] if cut == "powers" else [])
        whole, rest = np.divmod(predicted, length)
        # The pieces of each document: so many of the longest, then one for each bit of the rest, or the rest itself.
        counts = [whole] + ([(rest & size) > 0 for size in sizes[1:]] if cut == "powers" else [rest > 0])
        per_document = np.stack(counts, axis=1).astype(np.int64)
        self._documents = np.repeat(np.arange(len(predicted), dtype=np.int64), per_document.sum(axis=1))
        if not len(self._documents):
            raise ValueError(f"{documents}: no document has two tokens, so there is nothing to predict")
        flat = per_document.reshape(-1)
        if cut == "powers":
            kinds = np.tile(np.array(sizes, dtype=np.int64), len(predicted))
        else:
            kinds = np.stack([np.full_like(rest, length), rest], axis=1).reshape(-1)
        predicts = np.repeat(kinds, flat)
        self.lengths = (predicts + 1).astype(np.int32)
        # A piece begins where those before it in its document have predicted up to.
        before = np.cumsum(predicts) - predicts
        firsts = np.flatnonzero(np.diff(self._documents, prepend=-1))
        self._offsets = before - np.repeat(before[firsts], np.diff(np.append(firsts, len(before))))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """The tokens of a piece."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"piece {index} of {len(self)}")
        return self.source.get(int(self._documents[index]), int(self._offsets[index]), int(self.lengths[index]))

    def __repr__(self) -> str:
        return f"DocumentPieces({len(self)} pieces of up to {self.length} + 1, {self.cut})"
