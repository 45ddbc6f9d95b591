"""The rule by which everything in a layer's call that has a sequence dimension follows the kept tokens.

For hidden states of B rows and S tokens, K kept, a tensor among the other arguments, at any depth of tuples, lists and
dicts, is read by its shape; the first line that fits decides:

1. the argument named as the mask, and any ``[B or 1, *, S or 1, S]`` of four dimensions: an attention mask, gathered in
   its last dimension and, where that is S, in the one before;
2. ``[B, S, ...]`` (``[S, B, ...]`` when the hidden states are sequence-first): per token, gathered. ``[1, S, ...]``
   (``[S, 1, ...]``) is expanded to B rows first;
3. ``[B, S]`` beside sequence-first hidden states: a padding mask or ids, gathered;
4. ``[S, S]``: an attention mask for all rows. It must come out the same for every row (a causal one does) and is then
   ``[K, K]``; otherwise it is refused, since the rows keep different tokens;
5. anything else passes through.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.data_pipeline.random_ltd.sampling import gather_mask
from penstock.data_pipeline.random_ltd.token_ops import gather_tokens


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """Which tokens one call of a layer keeps.

    Attributes:
        indices: int32 ``[B, K]``, increasing along each row.
        length: Tokens of each row before dropping (S).
        batch_first: Whether the hidden states are ``[B, S, ...]`` or ``[S, B, ...]``.
    """

    indices: Tensor
    length: int
    batch_first: bool

    def per_token(self, tensor: Tensor) -> Tensor:
        """Gather a tensor laid out like the hidden states; differentiable."""
        return gather_tokens(tensor, self.indices, self.batch_first)[1]

    def inputs(self, value: Any, *, is_mask: bool = False) -> Any:
        """Apply the module's rule to an argument; ``is_mask`` says that it is the one named as the mask."""
        if isinstance(value, Tensor):
            return self._masked(value) if is_mask else self._tensor(value)
        return map_nest(lambda inner: self.inputs(inner, is_mask=is_mask), value)

    def _tensor(self, tensor: Tensor) -> Tensor:
        batch, length = self.indices.shape[0], self.length
        shape = tuple(tensor.shape)
        if len(shape) == 4 and shape[3] == length and shape[2] in (1, length) and shape[0] in (1, batch):
            return gather_mask(tensor, self.indices)
        if len(shape) < 2:
            return tensor
        if self.batch_first and shape[1] == length and shape[0] in (1, batch):
            return self.per_token(tensor.expand(batch, *shape[1:]))
        if not self.batch_first and shape[0] == length and shape[1] in (1, batch):
            return self.per_token(tensor.expand(length, batch, *shape[2:]))
        if shape == (batch, length):
            return self._batch_first(tensor)
        if shape == (length, length):
            return self._shared_mask(tensor)
        return tensor

    def _masked(self, mask: Tensor) -> Tensor:
        batch, length = self.indices.shape[0], self.length
        shape = tuple(mask.shape)
        if len(shape) == 4 and shape[3] == length and shape[2] in (1, length) and shape[0] in (1, batch):
            return gather_mask(mask, self.indices)
        if len(shape) == 3 and shape[2] == length and shape[1] in (1, length) and shape[0] in (1, batch):
            return gather_mask(mask.unsqueeze(1), self.indices).squeeze(1)
        if len(shape) == 2 and shape[1] == length and shape[0] in (1, batch):
            return self._batch_first(mask.expand(batch, length))
        if shape == (length, length):
            return self._shared_mask(mask)
        raise ValueError(
            f"cannot tell how the attention mask of shape {shape} goes with {batch} rows of {length} tokens; expected "
            f"[batch or 1, tokens], [tokens, tokens], [batch or 1, tokens or 1, tokens] or [batch or 1, heads or 1, "
            f"tokens or 1, tokens]"
        )

    def _batch_first(self, tensor: Tensor) -> Tensor:
        return tensor.gather(1, self.indices.to(device=tensor.device, dtype=torch.int64))

    def _shared_mask(self, mask: Tensor) -> Tensor:
        per_row = gather_mask(mask[None, None], self.indices).squeeze(1)
        if not bool((per_row == per_row[:1]).all()):
            raise ValueError(
                f"the attention mask of shape {tuple(mask.shape)} is not the same among the tokens that different rows "
                f"keep; pass it as [batch or 1, 1, {self.length}, {self.length}]"
            )
        return per_row[0]


def map_nest(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to the items of a tuple, list or dict; anything else is returned as it is."""
    if isinstance(value, tuple):
        items = [function(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [function(item) for item in value]
    if isinstance(value, dict):
        return {name: function(item) for name, item in value.items()}
    return value
