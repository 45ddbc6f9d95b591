"""Where a tensor's rows and tokens are, written as a short text, and how it is cut down to the kept tokens.

A layout has a word for each dimension, in order:

* ``B``: the rows of the batch (or 1, for all rows alike);
* ``S``: the tokens of a row; the kept ones are gathered there;
* ``Q``: the tokens as queries of an attention mask, or 1;
* ``_``: anything else;
* ``...``, as the last word only: any further dimensions.

So ``"B S ..."`` is a tensor per token, ``"B _ Q S"`` an attention mask, ``"_ B S"`` the three position ids of a token
in some vision models. A tensor without ``B`` gets it in front, since rows keep different tokens; only an ``S S`` mask,
which must come out the same for all rows, as a causal one does, stays one for all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.data_pipeline.random_ltd.sampling import gather_mask
from penstock.data_pipeline.random_ltd.token_ops import gather_tokens

_WORDS = ("B", "S", "Q", "_")
_REST = "..."


@dataclass(frozen=True, slots=True)
class Layout:
    """A parsed layout.

    Attributes:
        words: One of ``B``, ``S``, ``Q`` and ``_`` for each dimension.
        rest: Whether further dimensions may follow.
    """

    words: tuple[str, ...]
    rest: bool = False

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Read a layout.

        Raises:
            ValueError: A word is unknown, ``B`` stands twice, or the tokens' dimension is missing or stands too often.
        """
        words = text.split()
        rest = words[-1:] == [_REST]
        words = words[:-1] if rest else words
        wrong = [word for word in words if word not in _WORDS]
        tokens = words.count("S") + words.count("Q")
        if wrong or "S" not in words or tokens > 2 or words.count("B") > 1:
            raise ValueError(
                f"{text!r} is not a layout: a word for each dimension, B (rows, at most once), S (tokens, once; twice, "
                f"or as Q S, in an attention mask), _ (anything else), and ... at the end for further dimensions"
            )
        return cls(tuple(words), rest)

    def __str__(self) -> str:
        return " ".join((*self.words, _REST) if self.rest else self.words)

    def fits(self, shape: tuple[int, ...], rows: int, length: int) -> bool:
        """Whether a tensor of this shape can be laid out so, beside hidden states of ``rows`` rows of ``length``."""
        if len(shape) < len(self.words) or (len(shape) > len(self.words) and not self.rest):
            return False
        allowed = {"B": (1, rows), "S": (length,), "Q": (1, length)}
        return all(size in allowed.get(word, (size,)) for size, word in zip(shape, self.words, strict=False))

    def gather(self, tensor: Tensor, indices_BK: Tensor) -> Tensor:
        """The tensor among the kept tokens; differentiable.

        Args:
            tensor: One that the layout fits.
            indices_BK: int32 or int64, increasing along each row.

        Raises:
            ValueError: An ``S S`` tensor that comes out differently for rows that keep different tokens.
        """
        tokens = [dim for dim, word in enumerate(self.words) if word == "S" or (word == "Q" and tensor.shape[dim] > 1)]
        if "B" not in self.words:
            return _without_rows(tensor, indices_BK, tokens)
        rows = self.words.index("B")
        sizes = list(tensor.shape)
        sizes[rows] = indices_BK.shape[0]
        tensor = tensor.expand(sizes)
        if len(tokens) == 1:
            front = gather_tokens(tensor.movedim((rows, tokens[0]), (0, 1)), indices_BK, True)[1]
            return front.movedim((0, 1), (rows, tokens[0]))
        front = tensor.movedim((rows, *tokens), (0, -2, -1))
        kept = gather_mask(front.flatten(1, -3) if front.dim() > 3 else front.unsqueeze(1), indices_BK)
        kept = kept.unflatten(1, front.shape[1:-2]) if front.dim() > 3 else kept.squeeze(1)
        return kept.movedim((0, -2, -1), (rows, *tokens))


def _without_rows(tensor: Tensor, indices_BK: Tensor, tokens: list[int]) -> Tensor:
    """Gather a tensor that has no dimension of rows; it gets one in front, unless it is a plain ``S S`` mask."""
    at = indices_BK.to(device=tensor.device, dtype=torch.int64)
    if len(tokens) == 1:
        return tensor.movedim(tokens[0], 0)[at].movedim(1, tokens[0] + 1)
    if tensor.dim() > 2:
        return Layout(("B", *("S" if dim in tokens else "_" for dim in range(tensor.dim())))).gather(tensor[None], at)
    per_row = gather_mask(tensor[None, None], at)[:, 0]
    # The look at the data costs a GPU synchronisation; declared "causal", such a mask is cut without one.
    if not bool((per_row == per_row[:1]).all()):
        raise ValueError(
            f"the attention mask of shape {tuple(tensor.shape)} is not the same among the tokens that different rows "
            f"keep; pass it as [batch or 1, 1, {tensor.shape[0]}, {tensor.shape[0]}]"
        )
    return per_row[0]
