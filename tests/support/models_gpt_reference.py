"""The reference GPT's block once more, in the plainest terms, to compare with."""

import math

import torch
from torch import nn


def reference_block(block, config, hidden, positions, allowed):
    """One block in the plainest terms: loops over rows and heads, an explicit matrix of allowed pairs.

    Args:
        hidden: [B, S, D], float64. positions: [B, S]. allowed: bool [B, S, S], query by key.
    """

    def norm(x, weight):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turn(x, at):
        half = config.head_size // 2
        powers = torch.arange(half, dtype=torch.float64) / half
        angle = at[:, None] * config.rope_theta ** (-powers)
        z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    out = hidden.clone()
    width, size = config.hidden_size, config.head_size
    for row in range(hidden.shape[0]):
        x = norm(hidden[row], block.attn_norm.weight)
        by_head = block.attn.qkv.weight.view(config.num_heads, 3, size, width)  # each head's query, key and value
        q, k, v = (x @ by_head[:, i].reshape(width, width).T for i in range(3))
        heads = []
        for head in range(config.num_heads):
            part = slice(head * size, (head + 1) * size)
            qh, kh = q[:, part], k[:, part]
            if config.positions == "rope":
                qh, kh = turn(qh, positions[row]), turn(kh, positions[row])
            scores = (qh @ kh.T / math.sqrt(size)).masked_fill(~allowed[row], -torch.inf)
            # A query that may attend to nothing gets nothing.
            heads.append(scores.softmax(-1).nan_to_num(0.0) @ v[:, part])
        out[row] = hidden[row] + torch.cat(heads, -1) @ block.attn.out.weight.T
    y = norm(out, block.mlp_norm.weight) @ block.mlp.up.weight.T
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return out + y @ block.mlp.down.weight.T


def spread(block):
    """Weights far from their small start, so that attention is far from uniform."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block.double()
