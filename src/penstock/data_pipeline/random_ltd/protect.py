"""Tokens that a layer keeps before all others."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def protected_tokens(
    input_ids_BS: Tensor,
    *,
    token_ids: Sequence[int] = (),
    separator_id: int | None = None,
    position_ids_BS: Tensor | None = None,
    document_ids_BS: Tensor | None = None,
    predicate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Mark tokens to protect, for the argument or dict entry ``protected_tokens`` of layers that drop tokens.

    What is asked for is joined by *or*; with nothing but the ids, nothing is marked.

    Args:
        input_ids_BS: Integer token ids ``[B, S]``.
        token_ids: Ids to keep: special tokens.
        separator_id: The id that ends a document; each row's first token and the tokens after it begin one.
        position_ids_BS: Positions within packed documents; where they do not go on by one, a document begins.
        document_ids_BS: Ids of packed documents; where they change, a document begins.
        predicate: From the ids to bool ``[B, S]``.

    Returns:
        bool ``[B, S]``, True where the token is to be kept.
    """
    marked = torch.zeros_like(input_ids_BS, dtype=torch.bool)
    if token_ids:
        marked |= torch.isin(input_ids_BS, torch.tensor(token_ids, device=input_ids_BS.device))
    if separator_id is not None:
        marked |= _starts(input_ids_BS[:, :-1] == separator_id, input_ids_BS)
    if position_ids_BS is not None:
        positions = position_ids_BS.expand_as(input_ids_BS)
        marked |= _starts(positions[:, 1:] != positions[:, :-1] + 1, input_ids_BS)
    if document_ids_BS is not None:
        documents = document_ids_BS.expand_as(input_ids_BS)
        marked |= _starts(documents[:, 1:] != documents[:, :-1], input_ids_BS)
    if predicate is not None:
        chosen = predicate(input_ids_BS)
        if chosen.dtype != torch.bool or chosen.shape != input_ids_BS.shape:
            raise ValueError(
                f"the predicate must give bool {tuple(input_ids_BS.shape)}, got {chosen.dtype} {tuple(chosen.shape)}"
            )
        marked |= chosen
    return marked


class MarkProtectedTokens(nn.Module):
    """Wraps a model's first layer and puts ``protected_tokens`` into the dict that it returns.

    Args:
        layer: Takes token ids ``[B, S]``, or a dict with them under ``"input_ids"``, and returns a dict.
        token_ids: As for :func:`protected_tokens`.
        separator_id: As for :func:`protected_tokens`.
    """

    def __init__(self, layer: nn.Module, *, token_ids: Sequence[int] = (), separator_id: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.token_ids = tuple(token_ids)
        self.separator_id = separator_id

    def forward(self, value: Any) -> dict[str, Any]:
        """Call the layer and mark the tokens; nothing is marked in eval mode, where none is dropped."""
        output = self.layer(value)
        if not isinstance(output, dict):
            raise ValueError(
                f"protected tokens travel in the dict that the layers pass on, but {type(self.layer).__name__} returns "
                f"{type(output).__name__}; let it return a dict with the hidden states under 'hidden'"
            )
        if not self.training:
            return output
        ids = value.get("input_ids") if isinstance(value, dict) else value
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(
                "protected tokens are found by the token ids: the model's input must be integers [batch, tokens], or a "
                "dict with these under 'input_ids'"
            )
        marked = protected_tokens(ids, token_ids=self.token_ids, separator_id=self.separator_id)
        return {**output, "protected_tokens": marked}


def _starts(after_first: Tensor, like: Tensor) -> Tensor:
    """``after_first [B, S - 1]`` with the first token of each row, which always begins a document, in front."""
    return torch.cat((torch.ones_like(like[:, :1], dtype=torch.bool), after_first), dim=1)
