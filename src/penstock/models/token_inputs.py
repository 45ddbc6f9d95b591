"""What a model's first layer is given: token ids, alone or with what belongs to each of them."""

from typing import Any

import torch
from torch import Tensor

from penstock._core.sequence_slice import current_slice
from penstock.models.checks import check_length, check_token_ids, check_vocabulary

TokenValue = dict[str, Any]


def token_inputs(value: Tensor | TokenValue, *, context_length: int, vocab_size: int) -> TokenValue:
    """The inputs of the reference GPT, checked.

    Args:
        value: int64 token ids ``[B, S]``, or a dict with them under ``"input_ids"`` and, if need be, integer
            ``"position_ids"`` and ``"document_ids"`` ``[B, S]``.
        context_length: The longest sequence that the model takes, of all its slices.
        vocab_size: Of the model.

    Returns:
        A dict with ``"input_ids"``, ``"position_ids"`` (int64 ``[B, S]``, counted along the row where they are not
        given) and the other entries.

    Raises:
        ValueError: They do not fit the model or each other.
    """
    given = dict(value) if isinstance(value, dict) else {"input_ids": value}
    input_ids_BS = check_token_ids(given.get("input_ids"))
    for name in ("position_ids", "document_ids"):
        if name in given and given[name].shape != input_ids_BS.shape:
            raise ValueError(
                f"{name} must be one for each token, {tuple(input_ids_BS.shape)}; got {tuple(given[name].shape)}"
            )
    rows, length = input_ids_BS.shape
    piece = current_slice()
    start = 0 if piece is None else piece.extend(input_ids_BS).shape[1] - length
    check_length(start + length, context_length)
    check_vocabulary(input_ids_BS, vocab_size)
    position_ids_BS = torch.arange(start, start + length, device=input_ids_BS.device).expand(rows, length)
    return {"position_ids": position_ids_BS, **given}
