"""Rows that hold several documents."""

import torch
from torch import Tensor


def document_mask(document_ids_BS: Tensor) -> Tensor:
    """Which places a place may attend to: those of its document up to itself; bool ``[B, 1, S, S]``, True is allowed.

    As ``attn_mask`` of torch's ``scaled_dot_product_attention``, and as the four-dimensional ``attention_mask`` of
    Hugging Face models (with attention ``sdpa``, and with ``position_ids`` beside it).

    Args:
        document_ids_BS: Integers; places of the same id are one document.
    """
    length = document_ids_BS.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids_BS.device).tril()
    return (document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :]) & causal
