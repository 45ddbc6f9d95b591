"""What identifies the micro-batch that is being computed, for the layers that draw random numbers.

A layer that drops tokens or units must make the same choice whichever rank, replica or micro-batch split computes it,
and again when activation checkpointing recomputes it, possibly on one of autograd's threads. So the engine *enters* a
:class:`BatchKey` around each forward, a layer reads it with :func:`current_batch_key` at forward time, and whatever
replays the forward later captures the key and enters it again.
"""

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from penstock._core.keys import derive, seed_torch

if TYPE_CHECKING:
    from penstock._core.sequence_slice import SequenceSlice


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Names one micro-batch of one step.

    Attributes:
        seed: The run's seed.
        step: Optimizer step, from 0.
        micro_batch: Index of the micro-batch in the *global* batch, over all replicas, from 0.
        positions: For each row of the micro-batch, the sample's position ``k`` in the run's global order. Empty where
            the caller does not know (then random-LTD falls back on ``micro_batch`` and the row number).
        piece: The slice of the sequence, where a schedule cuts sequences.
    """

    seed: int
    step: int
    micro_batch: int
    positions: tuple[int, ...] = ()
    piece: "SequenceSlice | None" = field(default=None, compare=False)

    def layer_key(self, purpose: str, layer: int) -> int:
        """The 64-bit key of a choice made once per micro-batch in one layer, dropout for example."""
        piece = () if self.piece is None else (self.piece.number,)
        return derive(self.seed, purpose, self.step, self.micro_batch, layer, *piece)

    def seed_layer(self, layer: int, device: torch.device | None = None) -> None:
        """Seed torch's generators, of the CPU and of ``device``, for what layer ``layer`` draws in this micro-batch."""
        seed_torch(self.layer_key("dropout", layer), device)


_local = threading.local()


def current_batch_key() -> BatchKey | None:
    """The key entered by the engine on this thread, or None outside an engine."""
    key: BatchKey | None = getattr(_local, "key", None)
    return key


class entered:  # noqa: N801  - used like a function, in every forward pass: a generator would cost more
    """Make ``key`` the current one on this thread for the length of the ``with`` block."""

    __slots__ = ("_before", "_key")

    def __init__(self, key: BatchKey | None) -> None:
        self._key = key

    def __enter__(self) -> None:
        self._before = current_batch_key()
        _local.key = self._key

    def __exit__(self, *_: object) -> None:
        _local.key = self._before
