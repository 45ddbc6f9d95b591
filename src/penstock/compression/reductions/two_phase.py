"""All-to-all of compressed chunks, a sum by each chunk's owner, all-gather of compressed sums.

::

              rank 0              rank 1
    start     [ x0 | x1 ]         [ x0' | x1' ]       add worker memory, compress each chunk, all-to-all
    advance   s0 = x0 + x0'       s1 = x1 + x1'       decompress, sum in rank order, add server memory, compress
    advance   [ s0 | s1 ]         [ s0 | s1 ]         all-gather, decompress: the same bits on every rank

The two-phase scheme is that of Tang et al., "1-bit Adam: communication efficient large-scale training with Adam's
convergence speed", ICML 2021.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from penstock.compression.algorithm import (
    CompressionAlgorithm,
    Payload,
    wire_bytes,
    wire_views,
    write_wire,
)
from penstock.compression.chunks import chunk_bounds
from penstock.compression.error_feedback import are_finite, compress_with_feedback, memory_dtype
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.reductions.base import Launched, StagedReduction, Wires
from penstock.compression.reductions.linear import take_back


class TwoPhaseReduction(StagedReduction):
    """A sum that any algorithm can make; the result has the same bits on every rank.

    A result with a NaN or infinity counts as not made: all memories go back to what they were, up to rounding (with
    EF21 they are never touched).

    Args:
        tensor: Flat and contiguous, float32 or float64; holds the result after :meth:`wait`.
        algorithm: Any algorithm.
        wires: The ranks to sum over.
        memory: Error memories, or None to let the errors go.
        factor: Multiplied into the sum: ``1 / ranks`` for an average.
        key: Which of several buffers this is, for random choices.
    """

    def __init__(
        self,
        tensor: Tensor,
        algorithm: CompressionAlgorithm,
        wires: Wires,
        *,
        memory: ErrorMemory | None = None,
        factor: float = 1.0,
        key: int = 0,
    ) -> None:
        super().__init__(wires)
        self._tensor = tensor
        self._algorithm = algorithm
        self._memory = memory
        self._factor = factor
        self._key = key
        rank, ranks = wires.rank, wires.ranks
        self._bounds = chunk_bounds(tensor.numel(), ranks)
        start, stop = self._bounds[rank]
        self._layouts = [algorithm.payload_layout(stop - start) for start, stop in self._bounds]
        self._sizes = [wire_bytes(layout) for layout in self._layouts]
        device = tensor.device
        self._out = torch.zeros(sum(self._sizes), dtype=torch.uint8, device=device)
        self._in = torch.zeros(self._sizes[rank] * ranks, dtype=torch.uint8, device=device)
        self._part = torch.zeros(self._sizes[0], dtype=torch.uint8, device=device)  # the first chunk is the largest
        self._all = torch.zeros(self._sizes[0] * ranks, dtype=torch.uint8, device=device)
        self._sum = torch.zeros(stop - start, dtype=memory_dtype(tensor.dtype), device=device)

    def _stages(self, step: int) -> Iterator[Launched]:
        memory, mine = self._memory, self._wires.rank
        if memory is not None and memory.rule.resets_at(step):
            memory.worker.zero_()
            memory.server.zero_()
        self._compress_chunks(step)
        yield self._wires.all_to_all(self._in, self._out, self._sizes, "all-to-all of compressed chunks")
        self._sum_chunk()
        total = self._sum if memory is None or memory.result is None else self._sum + memory.server
        if self._factor != 1.0:
            total = total.mul_(self._factor) if memory is None or memory.result is None else total * self._factor
        payload = self._compress(total, self._server_memory(), step, mine, "sum")
        write_wire(self._part[: self._sizes[mine]], payload, self._layouts[mine])
        yield self._wires.all_gather(self._all, self._part, "all-gather of compressed sums")
        sums = [wire_views(wire, layout) for wire, layout in zip(self._gathered(), self._layouts, strict=True)]
        if memory is None:
            self._decompress(sums, self._tensor)
        elif memory.result is None:
            if not are_finite(sums):
                self._take_back(memory, payload)
            self._decompress(sums, self._tensor)
        else:
            self._accept_estimate(memory, sums)

    def _compress_chunks(self, step: int) -> None:
        offset = 0
        for rank, (start, stop) in enumerate(self._bounds):
            owed = None if self._memory is None else self._memory.worker[start:stop]
            payload = self._compress(self._tensor[start:stop], owed, step, self._wires.rank, rank)
            write_wire(self._out[offset : offset + self._sizes[rank]], payload, self._layouts[rank])
            offset += self._sizes[rank]

    def _compress(self, tensor: Tensor, owed: Tensor | None, step: int, *place: int | str) -> Payload:
        algorithm = self._algorithm.keyed(step, self._key, *place)
        if owed is None or self._memory is None:
            return algorithm.compress(tensor)
        return compress_with_feedback(algorithm, tensor, owed, self._memory.rule)

    def _sum_chunk(self) -> None:
        mine = self._wires.rank
        size, layout = self._sizes[mine], self._layouts[mine]
        for rank in range(self._wires.ranks):
            part = wire_views(self._in[rank * size : (rank + 1) * size], layout)
            if rank == 0:
                self._algorithm.decompress(part, self._sum)
            else:
                self._algorithm.decompress_add(part, self._sum)

    def _server_memory(self) -> Tensor | None:
        """What the compression of this rank's sum starts from: with EF21, the common estimate of it."""
        if self._memory is None:
            return None
        if self._memory.result is None:
            return self._memory.server
        start, stop = self._bounds[self._wires.rank]
        return self._memory.result[start:stop]

    def _gathered(self) -> list[Tensor]:
        row = self._part.numel()
        return [self._all[rank * row : rank * row + size] for rank, size in enumerate(self._sizes)]

    def _decompress(self, parts: list[Payload], out: Tensor) -> None:
        for part, (start, stop) in zip(parts, self._bounds, strict=True):
            self._algorithm.decompress(part, out[start:stop])

    def _sent(self) -> list[Payload]:
        wires = torch.split(self._out, self._sizes)
        return [wire_views(wire, layout) for wire, layout in zip(wires, self._layouts, strict=True)]

    def _take_back(self, memory: ErrorMemory, payload: Payload) -> None:
        sent = torch.empty_like(memory.worker)
        self._decompress(self._sent(), sent)
        take_back(memory.worker, sent, self._tensor, memory)
        take_back(memory.server, self._algorithm.decompress(payload, torch.empty_like(self._sum)), self._sum, memory)

    def _accept_estimate(self, memory: ErrorMemory, parts: list[Payload]) -> None:
        """EF21: what was sent becomes part of the estimates, unless the result is not finite."""
        finite = are_finite(parts)
        sent = torch.empty_like(memory.worker)
        self._decompress(parts, self._tensor)
        self._decompress(self._sent(), sent)
        memory.accept_estimate(self._tensor, sent, finite=finite)
        if finite:
            memory.server.add_(self._sum)
