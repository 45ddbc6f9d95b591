"""One sum over the replicas, in up to two collectives, with all of its buffers allocated once.

A reduction goes ``start``, ``advance``, ``wait``. ``start`` and ``advance`` launch a collective without waiting for
it, so several reductions can be in flight; every rank must call them in the same order. ::

              rank 0              rank 1
    start     [ x0 | x1 ]         [ x0' | x1' ]       add worker memory, compress each chunk, all-to-all
    advance   s0 = x0 + x0'       s1 = x1 + x1'       decompress, sum in rank order, add server memory, compress
    wait      [ s0 | s1 ]         [ s0 | s1 ]         all-gather, decompress: the same bits on every rank

The two-phase scheme is that of Tang et al., "1-bit Adam: communication efficient large-scale training with Adam's
convergence speed", ICML 2021. A linear algorithm needs one plain all-reduce in a shorter dtype instead.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import REPLICAS, Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm, wire_bytes, wire_views, write_wire
from penstock.compression.algorithms.none import NoCompression
from penstock.compression.chunks import chunk_bounds
from penstock.compression.error_feedback import ErrorFeedback, memory_dtype
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.group import rank_in, ranks_of


class Reduction(Protocol):
    """A sum of one flat tensor over a group, in place."""

    def start(self) -> None:
        """Read the tensor and launch the first collective."""

    def advance(self) -> None:
        """Wait for the first collective and launch the second, if there is one."""

    def wait(self) -> None:
        """Wait for the last collective and write the result into the tensor."""


class LocalReduction:
    """The sum over one rank, or of no elements: nothing is sent, so nothing is compressed."""

    def start(self) -> None:
        """Nothing to launch."""

    def advance(self) -> None:
        """Nothing to launch."""

    def wait(self) -> None:
        """Nothing to wait for."""


class LinearReduction:
    """One all-reduce in the algorithm's wire dtype.

    Args:
        tensor: Flat and contiguous; holds the result after :meth:`wait`.
        algorithm: A linear one.
        group: The ranks to sum over.
        worker_error: Flat memory for what the cast loses, or None to let it go. What the sum itself loses by
            rounding is not fed back.
        factor: Multiplied in before the cast, so that an average does not overflow on the way.
        meter: Counts the bytes as ``replicas``.
        watcher: Bounds the wait.
    """

    def __init__(
        self,
        tensor: Tensor,
        algorithm: CompressionAlgorithm,
        group: dist.ProcessGroup | None,
        *,
        worker_error: Tensor | None = None,
        factor: float = 1.0,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        wire_dtype = algorithm.wire_dtype(tensor.dtype)
        self._tensor = tensor
        self._wire = tensor if wire_dtype == tensor.dtype else torch.empty_like(tensor, dtype=wire_dtype)
        self._feedback = (
            None if worker_error is None or algorithm.lossless else ErrorFeedback(algorithm, worker_error.view(-1))
        )
        self._group = group
        self._factor = factor
        self._waits = _Waits(meter, watcher)
        self._ranks = ranks_of(group)
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Scale, cast and launch the all-reduce."""
        if self._factor != 1.0:
            self._tensor.mul_(self._factor)
        if self._feedback is not None:
            self._wire.copy_(self._feedback.compress(self._tensor)["values"])
        elif self._wire is not self._tensor:
            self._wire.copy_(self._tensor)
        self._waits.count_all_reduce(self._wire, self._ranks)
        self._work = dist.all_reduce(self._wire, group=self._group, async_op=True)

    def advance(self) -> None:
        """There is no second collective."""

    def wait(self) -> None:
        """Wait and widen."""
        self._waits.wait(self._work, "all-reduce over replicas")
        self._work = None
        if self._wire is not self._tensor:
            self._tensor.copy_(self._wire)


class TwoPhaseReduction:
    """All-to-all of compressed chunks, a sum by each chunk's owner, all-gather of compressed sums.

    Args:
        tensor: Flat and contiguous, float32 or float64; holds the result after :meth:`wait`.
        algorithm: Any algorithm.
        group: The ranks to sum over.
        memory: Error memories, or None to let the errors go.
        factor: Multiplied into the sum: ``1 / ranks`` for an average.
        meter: Counts the bytes as ``replicas``.
        watcher: Bounds the waits.
    """

    def __init__(
        self,
        tensor: Tensor,
        algorithm: CompressionAlgorithm,
        group: dist.ProcessGroup | None,
        *,
        memory: ErrorMemory | None = None,
        factor: float = 1.0,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self._tensor = tensor
        self._algorithm = algorithm
        self._group = group
        self._memory = memory
        self._factor = factor
        self._waits = _Waits(meter, watcher)
        self._ranks, rank = ranks_of(group), rank_in(group)
        self._bounds = chunk_bounds(tensor.numel(), self._ranks)
        start, stop = self._bounds[rank]
        self._layouts = [algorithm.payload_layout(stop - start) for start, stop in self._bounds]
        self._sizes = [wire_bytes(layout) for layout in self._layouts]
        self._mine = rank
        device = tensor.device
        self._out = torch.zeros(sum(self._sizes), dtype=torch.uint8, device=device)
        self._in = torch.zeros(self._sizes[rank] * self._ranks, dtype=torch.uint8, device=device)
        self._part = torch.zeros(self._sizes[0], dtype=torch.uint8, device=device)  # the first chunk is the largest
        self._all = torch.zeros(self._sizes[0] * self._ranks, dtype=torch.uint8, device=device)
        self._sum = torch.zeros(stop - start, dtype=memory_dtype(tensor.dtype), device=device)
        self._scratch = torch.zeros_like(self._sum)
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Compress what each rank is to sum and launch the all-to-all."""
        offset = 0
        for (start, stop), layout, size in zip(self._bounds, self._layouts, self._sizes, strict=True):
            chunk = self._tensor[start:stop]
            if self._memory is None:
                payload = self._algorithm.compress(chunk)
            else:
                payload = ErrorFeedback(self._algorithm, self._memory.worker[start:stop]).compress(chunk)
            write_wire(self._out[offset : offset + size], payload, layout)
            offset += size
        sent = self._out.numel() - self._sizes[self._mine]
        received = self._in.numel() - self._sizes[self._mine]
        self._waits.count(sent, received)
        self._work = dist.all_to_all_single(
            self._in,
            self._out,
            output_split_sizes=[self._sizes[self._mine]] * self._ranks,
            input_split_sizes=self._sizes,
            group=self._group,
            async_op=True,
        )

    def advance(self) -> None:
        """Sum this rank's chunk in rank order, compress the sum and launch the all-gather."""
        self._waits.wait(self._work, "all-to-all of compressed chunks")
        size, layout = self._sizes[self._mine], self._layouts[self._mine]
        total = self._sum
        for rank in range(self._ranks):
            part = self._in[rank * size : (rank + 1) * size]
            self._algorithm.decompress(wire_views(part, layout), total if rank == 0 else self._scratch)
            if rank:
                total.add_(self._scratch)
        if self._factor != 1.0:
            total.mul_(self._factor)
        if self._memory is None:
            payload = self._algorithm.compress(total)
        else:
            payload = ErrorFeedback(self._algorithm, self._memory.server).compress(total)
        write_wire(self._part[:size], payload, layout)
        others = self._part.numel() * (self._ranks - 1)
        self._waits.count(others, others)
        self._work = dist.all_gather_single(self._all, self._part, group=self._group, async_op=True)

    def wait(self) -> None:
        """Decompress every chunk's sum into the tensor."""
        self._waits.wait(self._work, "all-gather of compressed sums")
        self._work = None
        row = self._part.numel()
        for rank, ((start, stop), layout) in enumerate(zip(self._bounds, self._layouts, strict=True)):
            part = self._all[rank * row : rank * row + self._sizes[rank]]
            self._algorithm.decompress(wire_views(part, layout), self._tensor[start:stop])


class _Waits:
    """Waits under a watcher and counts bytes and seconds in a meter, where there are such."""

    def __init__(self, meter: Meter | None, watcher: Watcher | None) -> None:
        self._meter = meter
        self._watcher = watcher

    def count(self, sent: int, received: int) -> None:
        if self._meter is not None:
            self._meter.count(REPLICAS, sent=sent, received=received)

    def count_all_reduce(self, wire: Tensor, ranks: int) -> None:
        if self._meter is not None:
            self._meter.all_reduce(REPLICAS, wire.numel() * wire.element_size(), ranks)

    def wait(self, work: dist.Work | None, action: str) -> None:
        if work is None:
            raise RuntimeError(f"{action}: nothing was started; call start() first")
        timed: AbstractContextManager[None] = nullcontext()
        if self._meter is not None:
            timed = self._meter.timed("wait_replicas")
        watched: AbstractContextManager[None] = nullcontext()
        if self._watcher is not None:
            watched = self._watcher.waiting(action)
        with timed, watched:
            work.wait()


def make_reduction(
    tensor: Tensor,
    algorithm: CompressionAlgorithm | None,
    group: dist.ProcessGroup | None,
    *,
    memory: ErrorMemory | None = None,
    factor: float = 1.0,
    meter: Meter | None = None,
    watcher: Watcher | None = None,
) -> Reduction:
    """The reduction that fits an algorithm (None: uncompressed) and a group; see the classes for the arguments."""
    if ranks_of(group) == 1 or tensor.numel() == 0:
        return LocalReduction()
    if algorithm is None:
        return LinearReduction(tensor, NoCompression(), group, factor=factor, meter=meter, watcher=watcher)
    if algorithm.linear:
        worker = None if memory is None else memory.worker
        return LinearReduction(
            tensor, algorithm, group, worker_error=worker, factor=factor, meter=meter, watcher=watcher
        )
    return TwoPhaseReduction(tensor, algorithm, group, memory=memory, factor=factor, meter=meter, watcher=watcher)
