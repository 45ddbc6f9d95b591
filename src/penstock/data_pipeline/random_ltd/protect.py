"""Tokens that a layer must always keep."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
        token_ids: Ids that are always kept: special tokens.
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


def _starts(after_first: Tensor, like: Tensor) -> Tensor:
    """``after_first [B, S - 1]`` with the first token of each row, which always begins a document, in front."""
    return torch.cat((torch.ones_like(like[:, :1], dtype=torch.bool), after_first), dim=1)
