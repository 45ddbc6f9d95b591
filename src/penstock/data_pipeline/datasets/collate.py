"""From rows of tokens to the pair that a language model is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

IGNORED: Final = -100
"""The label of a place that does not count; the default ``ignore_index`` of torch's cross entropy."""


@dataclass(frozen=True)
class TokenCollator:
    """Turns rows of ``n + 1`` tokens into inputs (all but the last) and labels (all but the first), padded at the end.

    Args:
        pad_token: Fills the inputs of shorter rows. What it is does not matter under causal attention: the labels
            there are ``-100``.
        length: Pad every batch to this many inputs, and refuse longer rows. None: to the batch's longest.
        multiple_of: Round the padded length up to a multiple of this.
    """

    pad_token: int = 0
    length: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.multiple_of < 1 or (self.length is not None and self.length < 1):
            raise ValueError(
                f"length and multiple_of must be at least 1, got length={self.length}, multiple_of={self.multiple_of}"
            )

    def __call__(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Collate a batch.

        Args:
            rows: A sequence of one-dimensional integer rows (lists, arrays or tensors), or an array or tensor of two
                dimensions.

        Returns:
            ``(input_ids_BS, labels_BS)``, both int64 and contiguous.

        Raises:
            ValueError: There is no row, a row is not integers in one dimension, is shorter than 2 tokens, or is longer
                than ``length + 1``.
        """
        if len(rows) == 0:
            raise ValueError("a batch without rows cannot be collated")
        if isinstance(rows, np.ndarray | Tensor) and rows.ndim == 2:
            tokens_BT = np.asarray(rows)
            _check(tokens_BT.dtype, tokens_BT.shape[1:], 0)
            lengths = [tokens_BT.shape[1]] * len(tokens_BT)
        else:
            arrays = [np.asarray(row) for row in rows]
            for number, array in enumerate(arrays):
                _check(array.dtype, array.shape, number)
            lengths = [len(array) for array in arrays]
            tokens_BT = np.stack(arrays) if len(set(lengths)) == 1 else _padded(arrays, lengths)
        width = self._width(max(lengths) - 1)
        if width == max(lengths) - 1 and min(lengths) == max(lengths):
            tokens = torch.from_numpy(tokens_BT.astype(np.int64, copy=not tokens_BT.flags.writeable))
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        inputs = torch.full((len(lengths), width), self.pad_token, dtype=torch.int64)
        labels = torch.full((len(lengths), width), IGNORED, dtype=torch.int64)
        for row, (array, length) in enumerate(zip(tokens_BT, lengths, strict=True)):
            tokens = torch.from_numpy(array[:length].astype(np.int64))
            inputs[row, : length - 1] = tokens[:-1]
            labels[row, : length - 1] = tokens[1:]
        return inputs, labels

    def _width(self, longest: int) -> int:
        if self.length is not None and longest > self.length:
            raise ValueError(
                f"a row of {longest} + 1 tokens does not fit length={self.length}; truncate the rows or raise it"
            )
        width = longest if self.length is None else self.length
        return -(-width // self.multiple_of) * self.multiple_of


def _check(dtype: np.dtype[Any], shape: Sequence[int], number: int) -> None:
    if len(shape) != 1 or not np.issubdtype(dtype, np.integer):
        raise ValueError(f"row {number} of the batch is not a row of tokens: shape {tuple(shape)} of {dtype}")
    if shape[0] < 2:
        raise ValueError(f"row {number} of the batch holds {shape[0]} tokens; an input and a label need at least 2")


def _padded(arrays: list[np.ndarray[Any, Any]], lengths: list[int]) -> np.ndarray[Any, Any]:
    tokens_BT = np.zeros((len(arrays), max(lengths)), dtype=np.int64)
    for row, array in enumerate(arrays):
        tokens_BT[row, : len(array)] = array
    return tokens_BT
