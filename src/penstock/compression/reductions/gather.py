"""One all-gather of every rank's payload; each rank sums them all."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from penstock.compression.algorithm import (
    CompressionAlgorithm,
    Payload,
    wire_bytes,
    wire_views,
    write_wire,
)
from penstock.compression.chunks import Part
from penstock.compression.error_feedback import are_finite, compress_with_feedback
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.reductions.base import Launched, StagedReduction, Wires
from penstock.compression.reductions.linear import take_back


class GatherReduction(StagedReduction):
    """For sparse payloads: the sum is exact, and summed in rank order by every rank, so the bits are the same on all.

    A result with a NaN or infinity counts as not made: the memory goes back to what it was, up to rounding (with EF21
    it is never touched).

    Args:
        tensor: Flat and contiguous, float32 or float64; holds the result after :meth:`wait`.
        algorithm: Any algorithm.
        wires: The ranks to sum over.
        parts: The tensors to compress one by one; what lies between them is lost. One for the whole buffer will do
            unless the algorithm is ``shaped``.
        memory: What is not sent is kept in its ``worker``; None lets it go.
        factor: Multiplied into the sum: ``1 / ranks`` for an average.
        key: Which of several buffers this is, for random choices.
    """

    def __init__(
        self,
        tensor: Tensor,
        algorithm: CompressionAlgorithm,
        wires: Wires,
        *,
        parts: Sequence[Part],
        memory: ErrorMemory | None = None,
        factor: float = 1.0,
        key: int = 0,
    ) -> None:
        super().__init__(wires)
        self._tensor = tensor
        self._algorithm = algorithm
        self._parts = list(parts)
        self._memory = memory
        self._factor = factor
        self._key = key
        self._layouts = [algorithm.layout_for(part.shape) for part in parts]
        self._sizes = [wire_bytes(layout) for layout in self._layouts]
        self._mine = torch.zeros(sum(self._sizes), dtype=torch.uint8, device=tensor.device)
        self._all = torch.zeros(self._mine.numel() * wires.ranks, dtype=torch.uint8, device=tensor.device)

    def _stages(self, step: int) -> Iterator[Launched]:
        memory = self._memory
        if memory is not None and memory.rule.resets_at(step):
            memory.worker.zero_()
        wires = torch.split(self._mine, self._sizes)
        for index, (part, wire, layout) in enumerate(zip(self._parts, wires, self._layouts, strict=True)):
            algorithm = self._algorithm.keyed(step, self._key, self._wires.rank, index)
            if memory is None:
                payload = algorithm.compress(part.of(self._tensor))
            else:
                payload = compress_with_feedback(algorithm, part.of(self._tensor), part.of(memory.worker), memory.rule)
            write_wire(wire, payload, layout)
        yield self._wires.all_gather(self._all, self._mine, "all-gather of compressed tensors")
        payloads = [self._payloads(wire) for wire in self._all.view(self._wires.ranks, -1)]
        self._settle(payloads)
        if self._factor != 1.0:
            self._tensor.mul_(self._factor)

    def _settle(self, payloads: list[list[Payload]]) -> None:
        """The sum into the tensor; the memory follows what became of it."""
        memory = self._memory
        finite = memory is None or are_finite(payload for one in payloads for payload in one)
        if memory is None or (finite and memory.result is None):
            self._sum(payloads, self._tensor)
            return
        sent = self._sum([payloads[self._wires.rank]], torch.empty_like(memory.worker))
        if memory.result is not None:
            memory.accept_estimate(self._sum(payloads, self._tensor), sent, finite=finite)
            return
        take_back(memory.worker, sent, self._tensor, memory)
        self._sum(payloads, self._tensor)

    def _payloads(self, wire: Tensor) -> list[Payload]:
        wires = torch.split(wire, self._sizes)
        return [wire_views(part, layout) for part, layout in zip(wires, self._layouts, strict=True)]

    def _sum(self, payloads: list[list[Payload]], out: Tensor) -> Tensor:
        out.zero_()
        for one in payloads:
            for part, payload in zip(self._parts, one, strict=True):
                self._algorithm.decompress_add(payload, part.of(out))
        return out
