"""Shapes of token batches in both orders of their first two dimensions."""

from collections.abc import Sequence


def batch_and_length(shape: Sequence[int], batch_first: bool) -> tuple[int, int]:
    """(B, S) of ``[B, S, ...]``, or of ``[S, B, ...]``."""
    return (shape[0], shape[1]) if batch_first else (shape[1], shape[0])


def with_length(shape: Sequence[int], length: int, batch_first: bool) -> tuple[int, ...]:
    """The shape with another number of tokens a row."""
    return (shape[0], length, *shape[2:]) if batch_first else (length, *shape[1:])
