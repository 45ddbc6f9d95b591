"""PowerSGD's two all-reduces: of ``M Q``, then of ``M' P``.

::

    start     y = x + memory; P = M Q for each matrix M of y; all-reduce all P, and what is sent as it is
    advance   orthonormalise P; Q = M' P; the memory becomes (1 - P P') M; all-reduce all Q
    advance   the result is P Q', and the next step starts from this Q

Algorithm 1 and 2 of Vogels, Karimireddy, Jaggi, NeurIPS 2019. The memory is what this rank's own factors leave out;
over all ranks that adds up to what the result leaves out.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from penstock.compression.algorithms.powersgd import PowerSGD, follow_start, orthonormal
from penstock.compression.chunks import Part
from penstock.compression.error_feedback import all_finite
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.reductions.base import Launched, StagedReduction, Wires


class LowRankReduction(StagedReduction):
    """A sum of matrices by their factors; vectors are summed as they are, in the same collectives.

    A result with a NaN or infinity counts as not made: the memory and the start of the next iteration stay as they
    were, the memory up to rounding.

    Args:
        tensor: Flat and contiguous, float32 or float64; holds the result after :meth:`wait`.
        algorithm: PowerSGD.
        wires: The ranks to sum over.
        parts: The tensors in the buffer; what lies between them is lost.
        memory: What is not sent is kept in its ``worker``, the next start in its ``starts``; None lets errors go and
            starts afresh after a resume.
        factor: Multiplied in beforehand: ``1 / ranks`` for an average.
    """

    def __init__(
        self,
        tensor: Tensor,
        algorithm: PowerSGD,
        wires: Wires,
        *,
        parts: Sequence[Part],
        memory: ErrorMemory | None = None,
        factor: float = 1.0,
    ) -> None:
        super().__init__(wires)
        self._tensor = tensor
        self._memory = memory
        self._factor = factor
        factors = [algorithm.factors(part.shape) for part in parts]
        self._matrices = [
            (part, rows, columns, rank)
            for part, found in zip(parts, factors, strict=True)
            if found is not None
            for rows, columns, rank in [found]
        ]
        self._plain = [part for part, found in zip(parts, factors, strict=True) if found is None]
        if memory is not None and memory.starts:
            self._starts = memory.starts
        else:
            made = [algorithm.start(part.shape, tensor.device) for part, *_ in self._matrices]
            self._starts = [start for start in made if start is not None]
        plain = sum(math.prod(part.shape) for part in self._plain)
        self._p = tensor.new_zeros(sum(rows * rank for _, rows, _, rank in self._matrices) + plain)
        self._q = tensor.new_zeros(sum(columns * rank for *_, columns, rank in self._matrices))

    def _stages(self, step: int) -> Iterator[Launched]:
        memory = self._memory
        if self._factor != 1.0:
            self._tensor.mul_(self._factor)
        if memory is not None and memory.rule.resets_at(step):
            memory.worker.zero_()
        total = self._tensor if memory is None else self._tensor + memory.worker
        p_views, plain = self._p_views()
        for (part, rows, columns, _), start, p in zip(self._matrices, self._starts, p_views, strict=True):
            torch.mm(part.of(total).view(rows, columns), start.to(total.dtype), out=p)
        for part, view in zip(self._plain, plain, strict=True):
            view.copy_(part.of(total))
        yield self._wires.all_reduce(self._p, "all-reduce of the left factors")
        q_views = self._q_views()
        for (part, rows, columns, _), p, q in zip(self._matrices, p_views, q_views, strict=True):
            p.copy_(orthonormal(p))
            torch.mm(part.of(total).view(rows, columns).T, p, out=q)
        mine = self._q.clone()
        yield self._wires.all_reduce(self._q, "all-reduce of the right factors")
        finite = all_finite(self._q) and all_finite(self._p)
        if memory is not None and finite:
            self._remember(memory, total, p_views, mine)
        for (part, rows, columns, _), start, p, q in zip(self._matrices, self._starts, p_views, q_views, strict=True):
            torch.mm(p, q.T, out=part.of(self._tensor).view(rows, columns))
            if finite:
                follow_start(start, q)
        for part, view in zip(self._plain, plain, strict=True):
            part.of(self._tensor).copy_(view)

    def _remember(self, memory: ErrorMemory, total: Tensor, p_views: list[Tensor], mine: Tensor) -> None:
        """What this rank's own factors leave out of each matrix; nothing is left of the rest."""
        before = memory.worker.clone() if memory.rule.decay else memory.worker
        memory.worker.zero_()
        offset = 0
        for (part, rows, columns, rank), p in zip(self._matrices, p_views, strict=True):
            q = mine[offset : offset + columns * rank].view(columns, rank)
            offset += columns * rank
            left = part.of(total).view(rows, columns) - p @ q.T
            part.of(memory.worker).copy_(left.view(part.shape))
        if memory.rule.decay:
            memory.worker.lerp_(before, memory.rule.decay)

    def _p_views(self) -> tuple[list[Tensor], list[Tensor]]:
        views, offset = [], 0
        for _, rows, _, rank in self._matrices:
            views.append(self._p[offset : offset + rows * rank].view(rows, rank))
            offset += rows * rank
        plain = []
        for part in self._plain:
            size = math.prod(part.shape)
            plain.append(self._p[offset : offset + size].view(part.shape))
            offset += size
        return views, plain

    def _q_views(self) -> list[Tensor]:
        views, offset = [], 0
        for _, _, columns, rank in self._matrices:
            views.append(self._q[offset : offset + columns * rank].view(columns, rank))
            offset += columns * rank
        return views
