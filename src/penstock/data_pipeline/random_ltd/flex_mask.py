"""FlexAttention's block masks among the kept tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def is_block_mask(value: object) -> "TypeGuard[BlockMask]":
    """Whether a value is a ``torch.nn.attention.flex_attention.BlockMask``; tells it without importing that module."""
    return type(value).__name__ == "BlockMask" and type(value).__module__.startswith("torch.nn.attention")


def gather_block_mask(mask: "BlockMask", indices_BK: Tensor, length: int) -> "BlockMask":
    """The block mask among each row's kept tokens.

    A block mask is made from a function of (row, head, query, key). The new one asks the old function about the tokens
    that the kept ones were, and its blocks are worked out anew: B evaluations of K x K.

    Args:
        mask: For S queries and keys, or more (some callers round S up).
        indices_BK: int32 or int64, increasing along each row.
        length: S.

    Raises:
        ValueError: The mask is for another number of rows or fewer tokens.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    rows, kept = indices_BK.shape
    mask_rows, heads = mask.shape[0], mask.shape[1]
    if mask_rows not in (1, rows) or min(mask.seq_lengths) < length:
        raise ValueError(
            f"the block mask is for {mask_rows} rows of {mask.seq_lengths[0]} queries and {mask.seq_lengths[1]} keys, "
            f"but the hidden states have {rows} rows of {length} tokens"
        )
    at = indices_BK.to(torch.int32)
    old: Callable[..., Tensor] = mask.mask_mod

    def among_kept(b: Any, h: Any, q: Any, kv: Any) -> Tensor:
        # A mask for all rows may look its rows up in a table of one row.
        return old(b if mask_rows > 1 else torch.zeros_like(b), h, at[b, q], at[b, kv])

    return create_block_mask(
        among_kept,
        B=rows,
        H=heads if heads > 1 else None,
        Q_LEN=kept,
        KV_LEN=kept,
        device=str(at.device),
        BLOCK_SIZE=mask.BLOCK_SIZE,
    )
