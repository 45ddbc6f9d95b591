"""A vector for each of some tokens: what a token embedding and an output layer share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.models.checks import check_vocabulary_division


class TokenVectors(nn.Module):
    """The weight of a token embedding, and its two uses; where it is divided by tokens, a rank has both for its part.

    Args:
        tokens: How many (V).
        width: Of a vector (D).
        std: Standard deviation of the initial weights.

    Attributes:
        weight: ``[V, D]``.
    """

    def __init__(self, tokens: int, width: int, *, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width))
        nn.init.normal_(self.weight, std=std)

    def lookup(self, ids_BS: Tensor) -> Tensor:
        """The tokens' vectors, ``[B, S, D]``."""
        return F.embedding(ids_BS, self.weight)

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Products with every token's vector, ``[B, S, V]``."""
        return F.linear(x_BSD, self.weight)

    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        """Divided by tokens; see :mod:`penstock.pipe.tensor_parallel.plan`."""
        check_vocabulary_division(len(self.weight), size)
        return {"": "vocabulary"}
