"""Compressed reduce-scatter and all-gather, for parameters that are sharded: FSDP2's two collectives.

::

    fully_shard(model)
    compress_fsdp(model, gradients=create_compression_algorithm("int8"), weights=create_compression_algorithm("fp8"))
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm, wire_bytes, wire_views, write_wire
from penstock.compression.error_feedback import compress_with_feedback, memory_dtype
from penstock.compression.reductions.base import Wires


class CompressedReduceScatter:
    """Each rank compresses what every other is to sum and sends it there; the sums stay where they are.

    Fits FSDP2's ``set_custom_reduce_scatter``. Compression, unlike addition, takes whole payloads, so the collective is
    finished when the call returns.

    Args:
        algorithm: Any algorithm but those that need the shapes of matrices.
        error_feedback: Keep what was not sent, a memory as large as the full gradient on every rank. One object then
            serves one module, whose gradients come in one size.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.
    """

    def __init__(
        self,
        algorithm: CompressionAlgorithm,
        *,
        error_feedback: bool = True,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        _refuse_shaped(algorithm)
        if error_feedback:
            algorithm.check_feedback()
        self.algorithm = algorithm
        self.memory: Tensor | None = None
        self._remembers = error_feedback and not algorithm.lossless
        self._meter = meter
        self._watcher = watcher
        self._calls = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for FSDP2's buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> None:
        """Reduce ``input_tensor`` ``[ranks * n]`` and leave this rank's part in ``output_tensor`` ``[n]``.

        Raises:
            ValueError: The operation is neither a sum nor an average, or the size is not that of the memory.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"a compressed reduce-scatter sums or averages, it cannot do {op}; use the default one")
        wires = Wires(group, meter=self._meter, watcher=self._watcher)
        flat, size = input_tensor.reshape(-1), output_tensor.numel()
        if self._remembers and self.memory is None:
            self.memory = torch.zeros(flat.numel(), dtype=memory_dtype(flat.dtype), device=flat.device)
        if self.memory is not None and self.memory.numel() != flat.numel():
            raise ValueError(
                f"the error memory is for gradients of {self.memory.numel()} elements, these have {flat.numel()}; make "
                "a CompressedReduceScatter for each module"
            )
        layout = self.algorithm.payload_layout(size)
        length = wire_bytes(layout)
        out = torch.empty(length * wires.ranks, dtype=torch.uint8, device=flat.device)
        received = torch.empty_like(out)
        for rank in range(wires.ranks):
            # A linear algorithm's places must be those of all; any other's may be its own.
            place = (rank,) if self.algorithm.linear else (wires.rank, rank)
            algorithm = self.algorithm.keyed("reduce-scatter", self._calls, *place)
            part = flat[rank * size : (rank + 1) * size]
            if self.memory is None:
                payload = algorithm.compress(part)
            else:
                payload = compress_with_feedback(algorithm, part, self.memory[rank * size : (rank + 1) * size])
            write_wire(out[rank * length : (rank + 1) * length], payload, layout)
        self._calls += 1
        wires.wait(wires.all_to_all(received, out, [length] * wires.ranks, "compressed reduce-scatter"))
        total = torch.zeros(size, dtype=memory_dtype(flat.dtype), device=flat.device)
        for rank in range(wires.ranks):
            payload = wire_views(received[rank * length : (rank + 1) * length], layout)
            self.algorithm.decompress_add(payload, total)
        if op == dist.ReduceOp.AVG:
            total.div_(wires.ranks)
        output_tensor.copy_(total.view(output_tensor.shape))

    def state_dict(self) -> dict[str, Any]:
        """The error memory and the calls so far."""
        return {"calls": self._calls, **({} if self.memory is None else {"memory": self.memory})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""
        self._calls = int(state["calls"])
        self.memory = state["memory"].clone() if "memory" in state else None


class CompressedAllGather:
    """Every rank's shard, compressed on the way: quantised weights in FSDP2's forward and backward passes.

    All ranks, the sender included, see the decompressed values, so they compute with the same weights; the shards that
    the optimizer updates keep every bit. Fits FSDP2's ``set_custom_all_gather``.

    Args:
        algorithm: Any algorithm but those that need the shapes of matrices; elementwise ones (``bf16``, ``fp8``,
            ``int8``) suit weights.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.
    """

    def __init__(
        self, algorithm: CompressionAlgorithm, *, meter: Meter | None = None, watcher: Watcher | None = None
    ) -> None:
        _refuse_shaped(algorithm)
        if algorithm.sparse:
            raise ValueError(f"{algorithm.name} would set most weights to zero; take fp8, int8 or the like for weights")
        self.algorithm = algorithm
        self._meter = meter
        self._watcher = watcher

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for FSDP2's buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill ``output_tensor`` ``[ranks * n]`` with the ranks' ``input_tensor`` ``[n]``."""
        wires = Wires(group, meter=self._meter, watcher=self._watcher)
        size = input_tensor.numel()
        layout = self.algorithm.payload_layout(size)
        mine = torch.zeros(wire_bytes(layout), dtype=torch.uint8, device=input_tensor.device)
        write_wire(mine, self.algorithm.compress(input_tensor), layout)
        gathered = torch.empty(mine.numel() * wires.ranks, dtype=torch.uint8, device=mine.device)
        wires.wait(wires.all_gather(gathered, mine, "compressed all-gather"))
        flat = output_tensor.view(-1)
        for rank, wire in enumerate(gathered.view(wires.ranks, -1)):
            self.algorithm.decompress(wire_views(wire, layout), flat[rank * size : (rank + 1) * size])


def compress_fsdp(
    model: nn.Module,
    *,
    gradients: CompressionAlgorithm | None = None,
    weights: CompressionAlgorithm | None = None,
    error_feedback: bool = True,
    meter: Meter | None = None,
    watcher: Watcher | None = None,
) -> dict[str, CompressedReduceScatter]:
    """Compress what a model sharded by ``fully_shard`` sends.

    Args:
        model: With :class:`torch.distributed.fsdp.FSDPModule` modules in it.
        gradients: Of the reduce-scatter; None leaves it as it is.
        weights: Of the all-gather; None leaves it as it is.
        error_feedback: For gradients.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Returns:
        The reduce-scatters by module name, whose ``state_dict`` belongs in a checkpoint.

    Raises:
        ValueError: No module is sharded, or an algorithm does not suit.
    """
    sharded = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    if not sharded:
        raise ValueError("no module is sharded: call torch.distributed.fsdp.fully_shard(module) first")
    made: dict[str, CompressedReduceScatter] = {}
    for name, module in sharded.items():
        if gradients is not None:
            made[name] = CompressedReduceScatter(gradients, error_feedback=error_feedback, meter=meter, watcher=watcher)
            module.set_custom_reduce_scatter(made[name])  # type: ignore[arg-type]
        if weights is not None:
            gather = CompressedAllGather(weights, meter=meter, watcher=watcher)
            module.set_custom_all_gather(gather)  # type: ignore[arg-type]
    return made


def _refuse_shaped(algorithm: CompressionAlgorithm) -> None:
    if algorithm.shaped:
        raise ValueError(f"{algorithm.name} compresses whole matrices, and a shard is none; take another algorithm")
