"""The numbers that make a BERT, checked when they are put together."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BERTConfig:
    """The shape of the reference BERT.

    Attributes:
        vocab_size: Tokens in the vocabulary (V).
        num_layers: Transformer blocks.
        hidden_size: Width of the residual stream (D); a multiple of ``num_heads``.
        num_heads: Attention heads (H).
        context_length: Longest sequence (S) that the model takes, in tokens.
        mlp_ratio: Width of the MLP's inner layer over ``hidden_size``.
        token_types: Kinds of segments.
        dropout: Probability of dropping a unit of the embeddings, the attention weights and each residual branch.
        init_std: Standard deviation of the initial weights.
        norm_eps: Epsilon of the layer norms.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    context_length: int
    mlp_ratio: float = 4.0
    token_types: int = 2
    dropout: float = 0.0
    init_std: float = 0.02
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "context_length", "token_types"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; take for example "
                f"hidden_size={self.num_heads * max(1, round(self.hidden_size / self.num_heads))}"
            )
        if self.mlp_size < 1:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} of hidden_size={self.hidden_size} leaves {self.mlp_size} units"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")
        for name in ("init_std", "norm_eps"):
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
