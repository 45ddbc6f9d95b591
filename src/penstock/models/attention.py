"""Attention by some of the heads that draws the random numbers of all of them."""

import math

import torch
from torch import Tensor


def attend_as_all_heads(
    q_BHSE: Tensor,
    k_BHKE: Tensor,
    v_BHKE: Tensor,
    allowed: Tensor,
    *,
    heads: range,
    num_heads: int,
    dropout: float,
) -> Tensor:
    """Attention with dropout on some of the heads, which drop what they would among all of them.

    So a rank that computes two heads of eight draws what one that computes eight draws, and whatever is drawn after it
    is the same on all ranks.

    Args:
        q_BHSE: Queries of the heads here.
        k_BHKE: Keys at K places.
        v_BHKE: Values.
        allowed: bool, broadcast to ``[B, H, S, K]``: who may attend to what. Who may attend to nothing gets zeros.
        heads: Those here, among ``num_heads``.
        num_heads: All.
        dropout: Probability of dropping an attention weight.
    """
    rows, _, length, width = q_BHSE.shape
    scores_BHSK = q_BHSE @ k_BHKE.transpose(-2, -1) / math.sqrt(width)
    weights_BHSK = scores_BHSK.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    weights_BHSK = weights_BHSK.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
    every_head = torch.empty(
        rows, num_heads, length, k_BHKE.shape[2], dtype=weights_BHSK.dtype, device=weights_BHSK.device
    )
    kept_BHSK = every_head.bernoulli_(1.0 - dropout)[:, heads.start : heads.stop]
    return (weights_BHSK * kept_BHSK / (1.0 - dropout)).to(v_BHKE.dtype) @ v_BHKE
