"""The layers of the reference GPT: small, pre-norm, without biases.

What travels between them is a dict ``{"hidden": x_BSD, "position_ids": p_BS}``. The positions travel with the tokens
because a layer may be given only some of the tokens (random-LTD): rotary angles and the causal order then stay those
of the full sequence. Where documents are packed into one row, ``"document_ids"`` travels too, and tokens attend within
their document only. Other entries of the dict pass through untouched.

Shapes: B rows, S tokens, D hidden units, H heads, E units per head, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock._core.documents import document_mask
from penstock._core.sequence_slice import current_slice, takes_slices
from penstock.models.attention import attend_as_all_heads
from penstock.models.checks import check_block_division, check_vocabulary_division
from penstock.models.gpt_config import GPTConfig
from penstock.models.rotary import rotary_angles, rotate
from penstock.models.token_inputs import TokenValue, token_inputs
from penstock.models.token_vectors import TokenVectors

GPTValue = TokenValue


@takes_slices
class TokenEmbedding(TokenVectors):
    """Token ids to vectors; the first layer, and with tied embeddings the owner of the output layer's weight.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size, std=config.init_std)
        self.context_length = config.context_length
        # Learned positions are added by the next layer, which then applies the dropout.
        self.dropout = config.dropout if config.positions == "rope" else 0.0

    def forward(self, value: Tensor | GPTValue) -> GPTValue:
        """Look the tokens up.

        Args:
            value: int64 token ids ``[B, S]`` with S at most ``context_length``; or a dict with them under
                ``"input_ids"`` and, if need be, integer ``"position_ids"`` ``[B, S]`` and ``"document_ids"`` ``[B, S]``
                of documents packed into one row.

        Returns:
            ``{"hidden": x_BSD, "position_ids": p_BS int64}`` and the dict's other entries. Positions that are not given
            are counted along the row.
        """
        given = token_inputs(value, context_length=self.context_length, vocab_size=len(self.weight))
        x_BSD = F.dropout(self.lookup(given.pop("input_ids")), self.dropout, self.training)
        return {**given, "hidden": x_BSD}


@takes_slices
class LearnedPositions(nn.Module):
    """Adds a trained vector for each position.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.weight = nn.Parameter(torch.empty(config.context_length, config.hidden_size))
        nn.init.normal_(self.weight, std=config.init_std)

    def forward(self, value: GPTValue) -> GPTValue:
        """Add to ``value["hidden"]`` the vectors of ``value["position_ids"]``."""
        x_BSD = value["hidden"] + F.embedding(value["position_ids"], self.weight)
        return {**value, "hidden": F.dropout(x_BSD, self.dropout, self.training)}


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it.

    Args:
        config: The model's shape.

    Attributes:
        heads: Which heads it computes: all, or a tensor-parallel rank's own.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = range(config.num_heads)
        # Its output features are those of head 0's query, key and value, then head 1's, and so on.
        self.qkv = _linear(config.hidden_size, 3 * config.hidden_size, std=config.init_std)
        self.out = _linear(config.hidden_size, config.hidden_size, std=_residual_std(config))

    def forward(self, x_BSD: Tensor, position_ids_BS: Tensor, document_ids_BS: Tensor | None = None) -> Tensor:
        """Attend in the order of the rows given, which must be the order of their positions.

        Args:
            x_BSD: Normalised hidden states.
            position_ids_BS: int64, increasing along each document; gaps are allowed.
            document_ids_BS: Integers; tokens attend to those of the same id. None is one document a row.

        Returns:
            What to add to the residual stream, ``[B, S, D]``.
        """
        config = self.config
        rows, length, _ = x_BSD.shape
        qkv_BSH3E = self.qkv(x_BSD).view(rows, length, len(self.heads), 3, config.head_size)
        q_BSHE, k_BSHE, v_BSHE = qkv_BSH3E.unbind(3)
        if config.positions == "rope":
            cos, sin = rotary_angles(position_ids_BS, config.head_size, theta=config.rope_theta, dtype=qkv_BSH3E.dtype)
            cos, sin = cos[:, :, None, None, :], sin[:, :, None, None, :]
            q_BSHE, k_BSHE = rotate(qkv_BSH3E[:, :, :, :2], cos, sin).unbind(3)
        piece = current_slice()
        if piece is not None:  # K places: those of the earlier slices, then the S here
            k_BSHE, v_BSHE = piece.extend(k_BSHE), piece.extend(v_BSHE)
            document_ids_BS = None if document_ids_BS is None else piece.extend(document_ids_BS)
        mask = None if document_ids_BS is None else document_mask(document_ids_BS)[:, :, -length:]
        places = k_BSHE.shape[1]
        as_all_heads = self.training and config.dropout > 0.0 and len(self.heads) < config.num_heads
        if mask is None and (places > length or as_all_heads):
            mask = torch.ones(length, places, dtype=torch.bool, device=x_BSD.device).tril(places - length)
        q_BHSE, k_BHKE, v_BHKE = (x_BSHE.transpose(1, 2) for x_BSHE in (q_BSHE, k_BSHE, v_BSHE))
        if as_all_heads:
            assert mask is not None
            y_BHSE = attend_as_all_heads(
                q_BHSE, k_BHKE, v_BHKE, mask, heads=self.heads, num_heads=config.num_heads, dropout=config.dropout
            )
        else:
            y_BHSE = F.scaled_dot_product_attention(
                q_BHSE,
                k_BHKE,
                v_BHKE,
                dropout_p=config.dropout if self.training else 0.0,
                attn_mask=mask,
                is_causal=mask is None,
            )
        y_BSD: Tensor = self.out(y_BHSE.transpose(1, 2).reshape(rows, length, len(self.heads) * config.head_size))
        return y_BSD


class MLP(nn.Module):
    """Two linear maps with a GELU between them.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = _linear(config.hidden_size, config.mlp_size, std=config.init_std)
        self.down = _linear(config.mlp_size, config.hidden_size, std=_residual_std(config))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """What to add to the residual stream, ``[B, S, D]``."""
        y_BSD: Tensor = self.down(F.gelu(self.up(x_BSD)))
        return y_BSD


@takes_slices
class GPTBlock(nn.Module):
    """One transformer block: normalise, attend, add; normalise, transform, add.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attn_norm = _norm(config)
        self.attn = CausalSelfAttention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, value: GPTValue) -> GPTValue:
        """Update ``value["hidden"]``; the other entries pass through."""
        x_BSD = value["hidden"]
        attended = self.attn(self.attn_norm(x_BSD), value["position_ids"], value.get("document_ids"))
        x_BSD = x_BSD + F.dropout(attended, self.dropout, self.training)
        x_BSD = x_BSD + F.dropout(self.mlp(self.mlp_norm(x_BSD)), self.dropout, self.training)
        return {**value, "hidden": x_BSD}

    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        """Heads and the MLP's inner units divided; see :mod:`penstock.pipe.tensor_parallel.plan`."""
        check_block_division(len(self.attn.heads), self.mlp.up.out_features, size)
        return {
            "attn": "heads",
            "attn.qkv": "columns",
            "attn.out": "rows",
            "mlp.up": "columns",
            "mlp.down": "rows",
        }


@takes_slices
class FinalNorm(nn.Module):
    """The last normalisation; only the hidden states leave it, and the labels where the vocabulary is in parts.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.in_parts = config.vocabulary_parts > 1
        self.norm = _norm(config)

    def forward(self, value: GPTValue) -> Tensor | GPTValue:
        """Normalised hidden states ``[B, S, D]``, or a dict with them under ``"hidden"`` for the vocabulary's parts."""
        x_BSD: Tensor = self.norm(value["hidden"])
        if not self.in_parts:
            return x_BSD
        return {"hidden": x_BSD, **({"labels": value["labels"]} if "labels" in value else {})}


@takes_slices
class OutputHead(nn.Module):
    """Hidden states to logits with a weight of its own.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        nn.init.normal_(self.weight, std=config.init_std)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Logits ``[B, S, V]``."""
        return F.linear(x_BSD, self.weight)

    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        """Divided by tokens, the logits whole on every rank; see :mod:`penstock.pipe.tensor_parallel.plan`."""
        check_vocabulary_division(len(self.weight), size)
        return {"": "gathered_columns"}


@takes_slices
def tied_logits(embedding: nn.Module, x_BSD: Tensor) -> Tensor:
    """Logits ``[B, S, V]`` by the token embedding's weight: the ``forward_fn`` of the tied output layer."""
    if isinstance(embedding, TokenVectors):
        return embedding.logits(x_BSD)
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return F.linear(x_BSD, weight)


tied_logits.divisible = True  # type: ignore[attr-defined]


def _linear(inputs: int, outputs: int, *, std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=std)
    return linear


def _norm(config: GPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)


def _residual_std(config: GPTConfig) -> float:
    return config.init_std / math.sqrt(2 * config.num_layers)
