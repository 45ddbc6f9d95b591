"""Rows that hold several documents."""

import torch
from torch import Tensor


def document_mask(document_ids_BS: Tensor) -> Tensor:
    """Which places a place may attend to: those of its document up to itself; bool ``[B, 1, S, S]``, True is allowed.

    As ``attn_mask`` of torch's ``scaled_dot_product_attention``, and as the four-dimensional ``attention_mask`` of
    Hugging Face models (with attention ``sdpa``, and with ``position_ids`` beside it).

    Args:
        document_ids_BS: Integers; places of the same id are one document.

    Raises:
        ValueError: The numbers are not ``[B, S]``.
    """
    check_rows(document_ids_BS)
    length = document_ids_BS.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids_BS.device).tril()
    return (document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :]) & causal


def check_rows(document_ids_BS: Tensor) -> None:
    """Refuse documents' numbers that are not those of a batch of rows.

    Raises:
        ValueError: They are not ``[B, S]``.
    """
    if document_ids_BS.dim() != 2:
        raise ValueError(
            f"document_ids are [batch, length], got {list(document_ids_BS.shape)}; of one row take document_ids[None]"
        )
