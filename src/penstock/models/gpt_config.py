"""The numbers that make a GPT, checked when they are put together."""

from dataclasses import dataclass
from typing import Literal, get_args

from penstock.models.checks import check_shape

PositionKind = Literal["rope", "learned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """The shape of the reference GPT.

    Attributes:
        vocab_size: Tokens in the vocabulary (V).
        num_layers: Transformer blocks.
        hidden_size: Width of the residual stream (D); a multiple of ``num_heads``.
        num_heads: Attention heads (H); the width of a head is ``hidden_size // num_heads``.
        context_length: Longest sequence (S) that the model takes, in tokens.
        mlp_ratio: Width of the MLP's inner layer over ``hidden_size``.
        positions: ``"rope"`` rotates queries and keys by their position, ``"learned"`` adds a trained vector.
        rope_theta: Base of the rotary frequencies; without effect on learned positions.
        dropout: Probability of dropping a unit of the embeddings, the attention weights and each residual branch.
        tie_embeddings: Whether the output layer uses the token embedding's weight.
        init_std: Standard deviation of the initial weights; the two projections that write into the residual stream
            get ``init_std / sqrt(2 * num_layers)`` (as GPT-2).
        norm_eps: Epsilon of the layer norms.
        vocabulary_parts: Layers into which the token embedding and the output layer are each cut by tokens, so that
            stages may share them; 1 keeps both whole.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    context_length: int
    mlp_ratio: float = 4.0
    positions: PositionKind = "rope"
    rope_theta: float = 10_000.0
    dropout: float = 0.0
    tie_embeddings: bool = True
    init_std: float = 0.02
    norm_eps: float = 1e-5
    vocabulary_parts: int = 1

    def __post_init__(self) -> None:
        check_shape(
            self,
            counts=(
                "vocab_size",
                "num_layers",
                "hidden_size",
                "num_heads",
                "context_length",
                "vocabulary_parts",
            ),
            positive=("rope_theta", "init_std", "norm_eps"),
        )
        if self.vocabulary_parts > self.vocab_size:
            raise ValueError(
                f"vocabulary_parts={self.vocabulary_parts} is more than the vocabulary's {self.vocab_size} tokens; "
                "take fewer"
            )
        if self.positions not in get_args(PositionKind):
            raise ValueError(f"positions must be 'rope' or 'learned', got {self.positions!r}")
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(
                f"rotary positions turn pairs of units, but a head has {self.head_size} "
                f"(hidden_size={self.hidden_size} / num_heads={self.num_heads}); make it even, or use learned positions"
            )

    @property
    def head_size(self) -> int:
        """Units of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Units of the MLP's inner layer."""
        return round(self.mlp_ratio * self.hidden_size)

    def tokens_of_part(self, part: int) -> range:
        """The tokens of one of the ``vocabulary_parts``, counted from 0; their numbers differ by at most one."""
        parts = self.vocabulary_parts
        return range(self.vocab_size * part // parts, self.vocab_size * (part + 1) // parts)
