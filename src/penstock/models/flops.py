"""Floating-point operations of the reference models by formula, for a ledger of what a run spends.

A multiplication and an addition count as two. Matrix products are counted and nothing else; in causal attention only
the pairs that are attended to. The backward pass costs twice the forward pass.
"""

from penstock.models.bert_config import BERTConfig
from penstock.models.gpt_config import GPTConfig


def gpt_layer_flops(config: GPTConfig, tokens: int, seq_len: int) -> int:
    """Forward FLOPs of one transformer block.

    Args:
        config: The model's shape.
        tokens: Tokens that the block computes, over all rows.
        seq_len: Tokens per row; with dropping, the number kept.

    Returns:
        ``2 * matmul parameters * tokens`` for the projections plus ``2 * hidden_size * (seq_len + 1) * tokens`` for
        the scores and the weighted sum over, on average, ``(seq_len + 1) / 2`` tokens.
    """
    width = config.hidden_size
    matmul_parameters = 4 * width * width + 2 * width * config.mlp_size
    return 2 * matmul_parameters * tokens + 2 * width * (seq_len + 1) * tokens


def bert_layer_flops(config: BERTConfig, tokens: int, seq_len: int) -> int:
    """Forward FLOPs of one transformer block of the BERT; arguments as for :func:`gpt_layer_flops`.

    Returns:
        ``2 * matmul parameters * tokens`` for the projections plus ``4 * hidden_size * seq_len * tokens`` for the
        scores and the weighted sum over ``seq_len`` tokens.
    """
    width = config.hidden_size
    matmul_parameters = 4 * width * width + 2 * width * config.mlp_size
    return 2 * matmul_parameters * tokens + 4 * width * seq_len * tokens


def gpt_head_flops(config: GPTConfig | BERTConfig, tokens: int) -> int:
    """Forward FLOPs of the output layer."""
    return 2 * config.vocab_size * config.hidden_size * tokens


def gpt_flops(config: GPTConfig, rows: int, seq_len: int, *, dropping_layers: int = 0, kept: int | None = None) -> int:
    """Forward FLOPs of the whole model.

    Args:
        config: The model's shape.
        rows: Sequences.
        seq_len: Tokens of each.
        dropping_layers: Blocks that compute only ``kept`` tokens of each sequence.
        kept: Tokens kept there; None for all.

    Returns:
        The operations of the blocks and of the output layer.
    """
    if not 0 <= dropping_layers <= config.num_layers:
        raise ValueError(f"dropping_layers={dropping_layers} is not between 0 and num_layers={config.num_layers}")
    kept = seq_len if kept is None else min(kept, seq_len)
    full = gpt_layer_flops(config, rows * seq_len, seq_len)
    dropped = gpt_layer_flops(config, rows * kept, kept)
    blocks = (config.num_layers - dropping_layers) * full + dropping_layers * dropped
    return blocks + gpt_head_flops(config, rows * seq_len)
