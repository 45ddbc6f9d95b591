"""A bucket of DistributedDataParallel with what its reduction needs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.compression.error_memory import ErrorMemory
from penstock.compression.reduction import Reduction


class Span(NamedTuple):
    """Where one parameter's gradient lies.

    Attributes:
        source: Its first element in DDP's bucket.
        start: Its first element in the buffer that is reduced.
        shape: Its shape.
    """

    source: int
    start: int
    shape: torch.Size

    def views(self, bucket: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Its elements in both."""
        size = self.shape.numel()
        return bucket[self.source : self.source + size], flat[self.start : self.start + size]


class Piece:
    """The gradients of a bucket that are reduced together: all of them, unless rules part them.

    Args:
        spans: Which gradients; they follow one another in ``flat``.
        flat: What is reduced.
        in_place: It is DDP's bucket itself.
        memory: Error memories, if there are any.
        mask: 1 where a gradient may be, ``[numel of flat]``; None for everywhere.
        plain: The reduction during warm-up.
        compressed: The reduction after it.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        flat: Tensor,
        *,
        in_place: bool,
        memory: ErrorMemory | None,
        mask: Tensor | None,
        plain: Reduction,
        compressed: Reduction,
    ) -> None:
        self.flat = flat
        self.in_place = in_place
        self.memory = memory
        self.plain = plain
        self.compressed = compressed
        self._spans = list(spans)
        self._mask = mask
        self._before: dict[str, Tensor] = {}

    def fill(self, bucket: Tensor) -> None:
        """Gradients into the buffer."""
        if self.in_place:
            return
        for span in self._spans:
            source, flat = span.views(bucket, self.flat)
            flat.copy_(source)

    def write_back(self, bucket: Tensor, scale: float) -> None:
        """The result into the bucket, times ``scale`` where there is a memory.

        What a mask cuts off is neither sent nor owed.
        """
        if self._mask is not None:
            self.flat.mul_(self._mask)
            if self.memory is not None:
                self.memory.cut_off(self._mask)
        if scale != 1.0 and self.memory is not None:
            self.flat.mul_(scale)
        if self.in_place:
            return
        for span in self._spans:
            source, flat = span.views(bucket, self.flat)
            source.copy_(flat)

    def keep_memory(self) -> None:
        """Copy the memories for :meth:`restore_memory`."""
        if self.memory is None:
            return
        for name, tensor in self.memory.tensors().items():
            if name in self._before:
                self._before[name].copy_(tensor)
            else:
                self._before[name] = tensor.clone()

    def restore_memory(self) -> None:
        """Make the memories what they were."""
        if self.memory is None:
            return
        for name, tensor in self.memory.tensors().items():
            tensor.copy_(self._before[name])


class DDPSlot:
    """A bucket's place in DDP's order.

    Args:
        numbers: Of its parameters.
        numel: Its elements.
        pieces: What is reduced together, in the order in which reductions start.
    """

    def __init__(self, numbers: tuple[int, ...], numel: int, pieces: Sequence[Piece]) -> None:
        self.numbers = numbers
        self.numel = numel
        self.pieces = list(pieces)

    @property
    def memory(self) -> ErrorMemory | None:
        """The error memories of what is compressed."""
        return next((piece.memory for piece in self.pieces if piece.memory is not None), None)
