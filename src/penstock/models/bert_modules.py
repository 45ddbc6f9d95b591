"""The layers of the reference BERT: post-norm, with biases, every token attending to every other.

What travels between them is a dict ``{"hidden": x_BSD, "token_mask": m_BS}``; the mask is there if the batch has
padding, and True where a token is real. It travels with the tokens because a layer may be given only some of them
(random-LTD); positions are added once, before the blocks. Other entries of the dict pass through untouched.

Shapes: B rows, S tokens, D hidden units, H heads, E units per head, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.models.attention import attend_as_all_heads
from penstock.models.bert_config import BERTConfig
from penstock.models.checks import check_block_division, check_length, check_token_ids, check_vocabulary
from penstock.models.token_vectors import TokenVectors

BERTValue = dict[str, Any]


class BERTTokens(TokenVectors):
    """Token ids to vectors; the first layer, and the owner of the output layer's weight.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size, std=config.init_std)
        self.context_length = config.context_length

    def forward(self, value: Tensor | BERTValue) -> BERTValue:
        """Look the tokens up.

        Args:
            value: int64 token ids ``[B, S]``, or a dict with them under ``"input_ids"`` and, if need be,
                ``"attention_mask"`` (bool or integer ``[B, S]``, 0 for padding) and ``"token_type_ids"`` (integer
                ``[B, S]``).

        Returns:
            ``{"hidden": x_BSD}`` with ``"token_mask"`` and ``"token_type_ids"`` where given, and the dict's other
            entries.
        """
        given = dict(value) if isinstance(value, dict) else {"input_ids": value}
        ids_BS = check_token_ids(given.pop("input_ids", None))
        check_length(ids_BS.shape[1], self.context_length)
        check_vocabulary(ids_BS, len(self.weight))
        mask = given.pop("attention_mask", None)
        if mask is not None:
            if mask.shape != ids_BS.shape:
                raise ValueError(
                    f"attention_mask must mark the real tokens, {tuple(ids_BS.shape)}; got {tuple(mask.shape)}"
                )
            given["token_mask"] = mask.bool()
        return {**given, "hidden": self.lookup(ids_BS)}


class BERTPositions(nn.Module):
    """Adds a trained vector for each position and each segment, and normalises.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.positions = nn.Parameter(torch.empty(config.context_length, config.hidden_size))
        self.types = nn.Parameter(torch.empty(config.token_types, config.hidden_size))
        for weight in (self.positions, self.types):
            nn.init.normal_(weight, std=config.init_std)
        self.norm = _norm(config)

    def forward(self, value: BERTValue) -> BERTValue:
        """Add to ``value["hidden"]``; without ``"token_type_ids"`` all tokens are of type 0."""
        rest = {name: item for name, item in value.items() if name != "token_type_ids"}
        x_BSD, types_BS = value["hidden"], value.get("token_type_ids")
        typed = self.types[0] if types_BS is None else F.embedding(types_BS, self.types)
        x_BSD = self.norm(x_BSD + self.positions[: x_BSD.shape[1]] + typed)
        return {**rest, "hidden": F.dropout(x_BSD, self.dropout, self.training)}


class BERTBlock(nn.Module):
    """One transformer block: attend, add, normalise; transform, add, normalise.

    Args:
        config: The model's shape.

    Attributes:
        heads: Which attention heads it computes: all, or a tensor-parallel rank's own.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = range(config.num_heads)
        # Its output features are those of head 0's query, key and value, then head 1's, and so on.
        self.qkv = _linear(config, config.hidden_size, 3 * config.hidden_size)
        self.out = _linear(config, config.hidden_size, config.hidden_size)
        self.attn_norm = _norm(config)
        self.up = _linear(config, config.hidden_size, config.mlp_size)
        self.down = _linear(config, config.mlp_size, config.hidden_size)
        self.mlp_norm = _norm(config)

    def forward(self, value: BERTValue) -> BERTValue:
        """Update ``value["hidden"]``; the other entries pass through."""
        x_BSD, dropout = value["hidden"], self.config.dropout
        attended = self.out(self._attend(x_BSD, value.get("token_mask")))
        x_BSD = self.attn_norm(x_BSD + F.dropout(attended, dropout, self.training))
        transformed = self.down(F.gelu(self.up(x_BSD)))
        return {**value, "hidden": self.mlp_norm(x_BSD + F.dropout(transformed, dropout, self.training))}

    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        """Heads and the MLP's inner units divided; see :mod:`penstock.pipe.tensor_parallel.plan`."""
        check_block_division(len(self.heads), self.up.out_features, size)
        return {"": "heads", "qkv": "columns", "out": "rows", "up": "columns", "down": "rows"}

    def _attend(self, x_BSD: Tensor, real_BS: Tensor | None) -> Tensor:
        config, heads = self.config, self.heads
        rows, length, _ = x_BSD.shape
        qkv_BSH3E = self.qkv(x_BSD).view(rows, length, len(heads), 3, config.head_size)
        q_BHSE, k_BHSE, v_BHSE = (x_BSHE.transpose(1, 2) for x_BSHE in qkv_BSH3E.unbind(3))
        mask = None if real_BS is None else real_BS[:, None, None, :]
        if self.training and config.dropout > 0.0 and len(heads) < config.num_heads:
            allowed = torch.ones(1, 1, 1, length, dtype=torch.bool, device=x_BSD.device) if mask is None else mask
            y_BHSE = attend_as_all_heads(
                q_BHSE, k_BHSE, v_BHSE, allowed, heads=heads, num_heads=config.num_heads, dropout=config.dropout
            )
        else:
            y_BHSE = F.scaled_dot_product_attention(
                q_BHSE,
                k_BHSE,
                v_BHSE,
                # Of a row of which only padding was kept nothing may be attended to; PyTorch then gives zeros.
                attn_mask=mask,
                dropout_p=config.dropout if self.training else 0.0,
            )
        return y_BHSE.transpose(1, 2).reshape(rows, length, len(heads) * config.head_size)


class BERTTransform(nn.Module):
    """The part of the masked-token head before the output layer; only the hidden states leave it.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.linear = _linear(config, config.hidden_size, config.hidden_size)
        self.norm = _norm(config)

    def forward(self, value: BERTValue) -> Tensor:
        """Hidden states for the output layer, ``[B, S, D]``."""
        x_BSD: Tensor = self.norm(F.gelu(self.linear(value["hidden"])))
        return x_BSD

    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        """Divided by output features, the result whole on every rank; see :mod:`penstock.pipe.tensor_parallel.plan`."""
        return {"linear": "gathered_columns"}


class BERTOutputBias(nn.Module):
    """The output layer's bias, which the tied weight does not have.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, logits_BSV: Tensor) -> Tensor:
        """Logits ``[B, S, V]``."""
        return logits_BSV + self.bias


def _linear(config: BERTConfig, inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=config.init_std)
    nn.init.zeros_(linear.bias)
    return linear


def _norm(config: BERTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
