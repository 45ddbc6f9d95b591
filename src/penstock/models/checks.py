"""What the reference models ask of their shapes and of what they are given."""

from typing import Protocol

from torch import Tensor

from penstock.pipe.labels import IGNORED


class Shape(Protocol):
    """The numbers that every transformer here has."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_heads(self) -> int:
        """Attention heads."""

    @property
    def mlp_ratio(self) -> float:
        """Width of the MLP's inner layer over that of the residual stream."""

    @property
    def mlp_size(self) -> int:
        """Units of the MLP's inner layer."""

    @property
    def dropout(self) -> float:
        """Probability of dropping a unit."""


def check_shape(shape: Shape, *, counts: tuple[str, ...], positive: tuple[str, ...]) -> None:
    """Whether a model can be built of this.

    Args:
        shape: The model's configuration.
        counts: Names of its fields that must be integers of at least 1.
        positive: Names of those that must be above 0.

    Raises:
        ValueError: It cannot.
    """
    for name in counts:
        value = getattr(shape, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if shape.hidden_size % shape.num_heads:
        below = shape.hidden_size // shape.num_heads * shape.num_heads
        near = " and ".join(str(multiple) for multiple in (below, below + shape.num_heads) if multiple)
        raise ValueError(
            f"hidden_size={shape.hidden_size} is not a multiple of num_heads={shape.num_heads}; "
            f"the nearest multiples are {near}"
        )
    if shape.mlp_size < 1:
        raise ValueError(
            f"mlp_ratio={shape.mlp_ratio} of hidden_size={shape.hidden_size} leaves {shape.mlp_size} units"
        )
    if not 0.0 <= shape.dropout < 1.0:
        raise ValueError(f"dropout is a probability in [0, 1), got {shape.dropout}")
    for name in positive:
        if not getattr(shape, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(shape, name)}")


def check_token_ids(input_ids: object) -> Tensor:
    """Token ids as they should be, ``[B, S]``.

    Raises:
        ValueError: They are something else.
    """
    if not isinstance(input_ids, Tensor):
        got = repr(input_ids)
    elif input_ids.dim() != 2 or input_ids.is_floating_point():
        got = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
    else:
        return input_ids
    raise ValueError(
        f"the model takes integer token ids of shape [batch, tokens], or a dict with them under 'input_ids'; got {got}"
    )


def check_length(length: int, context_length: int) -> None:
    """Whether a sequence fits the model.

    Raises:
        ValueError: It is too long.
    """
    if length > context_length:
        raise ValueError(
            f"a sequence of {length} tokens does not fit the model's context_length={context_length}; "
            f"cut the sequences or build the model with a longer context"
        )


def check_vocabulary(input_ids_BS: Tensor, vocab_size: int) -> None:
    """Whether every id is that of a token.

    Raises:
        ValueError: One is not. Only on a CPU: on a GPU the look would cost a synchronisation; there the kernel asserts.
    """
    if input_ids_BS.device.type == "cpu" and input_ids_BS.numel():
        low, high = (int(bound) for bound in input_ids_BS.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token ids run from {low} to {high}, but the vocabulary has ids 0 to {vocab_size - 1}; "
                "use the tokenizer that the model was sized for, or a larger vocab_size"
            )


def check_labels(labels_BS: Tensor | None, input_ids_BS: Tensor, vocab_size: int) -> None:
    """Whether there is one label for each token, a token or :data:`~penstock.pipe.labels.IGNORED`; None is none at all.

    Raises:
        ValueError: There is not; values are looked at as in :func:`check_vocabulary`.
    """
    if labels_BS is None:
        return
    if labels_BS.shape != input_ids_BS.shape:
        raise ValueError(
            f"labels must be one for each token, {tuple(input_ids_BS.shape)}; got {tuple(labels_BS.shape)}"
        )
    if labels_BS.device.type == "cpu":
        check_vocabulary(labels_BS[labels_BS != IGNORED], vocab_size)


def check_vocabulary_division(vocabulary: int, size: int) -> None:
    """Whether so many ranks can have some tokens each.

    Raises:
        ValueError: They cannot.
    """
    if vocabulary < size:
        raise ValueError(f"tensor_parallel.size={size} is more than the vocabulary of {vocabulary} tokens; take fewer")


def check_block_division(heads: int, inner: int, size: int) -> None:
    """Whether so many ranks can divide a block's attention heads and its MLP's inner units.

    Raises:
        ValueError: They cannot.
    """
    if heads % size:
        raise ValueError(
            f"tensor_parallel.size={size} cannot divide num_heads={heads} evenly; take a size that divides it"
        )
    if inner < size:
        raise ValueError(f"tensor_parallel.size={size} is more than the MLP's {inner} inner units; take fewer")
