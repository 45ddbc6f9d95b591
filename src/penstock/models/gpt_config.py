"""The numbers that make a GPT, checked when they are put together."""

from dataclasses import dataclass
from typing import Literal, get_args

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

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                f"the nearest multiples are {self._near_multiples()}"
            )
        if self.positions not in get_args(PositionKind):
            raise ValueError(f"positions must be 'rope' or 'learned', got {self.positions!r}")
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(
                f"rotary positions turn pairs of units, but a head has {self.head_size} "
                f"(hidden_size={self.hidden_size} / num_heads={self.num_heads}); make it even, or use learned positions"
            )
        if self.mlp_size < 1:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} of hidden_size={self.hidden_size} leaves {self.mlp_size} units"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")
        for name in ("rope_theta", "init_std", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def head_size(self) -> int:
        """Units of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Units of the MLP's inner layer."""
        return round(self.mlp_ratio * self.hidden_size)

    def _near_multiples(self) -> str:
        below = self.hidden_size // self.num_heads * self.num_heads
        near = [str(multiple) for multiple in (below, below + self.num_heads) if multiple]
        return " and ".join(near)
