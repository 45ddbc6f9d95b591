"""The numbers that make a BERT, checked when they are put together."""

from dataclasses import dataclass

from penstock.models.checks import check_shape


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
        check_shape(
            self,
            counts=("vocab_size", "num_layers", "hidden_size", "num_heads", "context_length", "token_types"),
            positive=("init_std", "norm_eps"),
        )

    @property
    def head_size(self) -> int:
        """Units of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Units of the MLP's inner layer."""
        return round(self.mlp_ratio * self.hidden_size)
