"""Sequences computed slice by slice, and what a layer that mixes tokens keeps from one slice for the next.

A schedule may cut micro-batches along the sequence (Sun et al., "Seq1F1B", 2024). Slices of a sequence run forward in
order and backward in reverse order. A layer that treats tokens alone need not know. One that looks back, as causal
attention does, asks for the current slice and has it put what came before in front::

    piece = current_slice()
    if piece is not None:
        keys, values = piece.extend(keys), piece.extend(values)

What is put in front has no graph of its own: gradients for it gather where the engine finds them, and enter the
backward pass of the slice that it came from. So each slice's graph lives only as long as its own passes.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from penstock._core.batch_key import current_batch_key

T = TypeVar("T", bound=Callable[..., Any])


def takes_slices(layer: T) -> T:
    """Say of a layer's class, or of a function, that it gives the same when it is called slice by slice.

    Either it treats every token alone, or it looks back by :meth:`SequenceSlice.extend` only.
    """
    setattr(layer, "takes_slices", True)  # noqa: B010  - of no type that knows it
    return layer


class SequenceSlice:
    """One slice of a micro-batch's sequence, during its forward pass through one stage.

    Args:
        number: Which, from 0.
        kept: For each use of :meth:`extend` in a forward pass of the stage, what earlier slices left; the same list for
            all slices of a sequence.

    Attributes:
        exports: Tensors of this slice that later ones look at, and the leaves that stand for them there.
    """

    def __init__(self, number: int, kept: list[list[Tensor]]) -> None:
        self.number = number
        self.exports: list[tuple[Tensor, Tensor]] = []
        self._kept = kept
        self._uses = 0

    def extend(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """The tensor with those of the earlier slices before it, and kept for the later ones.

        Layers call it in the same order in every slice.

        Args:
            tensor: Of this slice alone.
            dim: Along which the sequence runs.
        """
        if self.number == 0:
            self._kept.append([])
        pieces = self._kept[self._uses]
        self._uses += 1
        whole = torch.cat([*pieces, tensor], dim) if pieces else tensor
        leaf = tensor.detach()
        if tensor.requires_grad:
            leaf.requires_grad_()
            self.exports.append((tensor, leaf))
        pieces.append(leaf)
        return whole


def current_slice() -> SequenceSlice | None:
    """The slice that the engine computes on this thread; None where sequences are whole."""
    key = current_batch_key()
    return None if key is None else key.piece
