"""Micro-batches."""

import pytest

from penstock.pipe import MicroBatch


def test_defaults() -> None:
    batch = MicroBatch("inputs", "targets", 3)
    assert (batch.positions, batch.weight) == ((), 1.0)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="counts from 0 over the global batch, got -1"):
        MicroBatch(None, None, -1)
    with pytest.raises(ValueError, match=r"micro-batch 2: its weight must not be negative, got -0.5"):
        MicroBatch(None, None, 2, weight=-0.5)
    with pytest.raises(ValueError, match="got nan"):
        MicroBatch(None, None, 2, weight=float("nan"))
