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
from penstock.compression.algorithms.randomk import RandomK
from penstock.compression.error_feedback import CLASSIC, FeedbackRule, compress_with_feedback, is_finite, memory_dtype
from penstock.compression.reductions.base import Wires
from penstock.compression.shard_layout import ShardLayout


class CompressedReduceScatter:
    """Each rank compresses what every other is to sum and sends it there; the sums stay where they are.

    Fits FSDP2's ``set_custom_reduce_scatter``. Compression, unlike addition, takes whole payloads, so the collective is
    finished when the call returns.

    Args:
        algorithm: Any algorithm but those that need the shapes of matrices.
        error_feedback: Keep what was not sent, a memory as large as the full gradient on every rank; a
            :class:`FeedbackRule` says how. One object then serves one module, whose gradients come in one size.
        warmup_steps: Calls at the start that go uncompressed.
        undoable: Keep a copy of the memory as it was before each call, for :meth:`undo`.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Attributes:
        step: Calls so far: they key random choices and time warm-up and resets. May be set.
        scale: Multiplied into gradients before they are compressed, so that the memory is in units of the result
            whatever scales the loss. May be set, to the same number on every rank.
        memory: What this rank owes to each rank's sum, ``[ranks * n]``; with EF21, what they know of its gradients.
            None before the first compressed call.
        received: With EF21, the sum of what is known here of the ranks' gradients, ``[n]``.
        module: Whose gradients are reduced, as :func:`compress_fsdp` sets it; None where nobody said.
    """

    def __init__(
        self,
        algorithm: CompressionAlgorithm,
        *,
        error_feedback: bool | FeedbackRule = True,
        warmup_steps: int = 0,
        undoable: bool = False,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        refuse_shaped(algorithm)
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self._rule = error_feedback if isinstance(error_feedback, FeedbackRule) else CLASSIC
        self._remembers = bool(error_feedback) and not algorithm.lossless
        if self._remembers:
            self._rule.check(algorithm)
        self.algorithm = algorithm
        self.step = 0
        self.scale = 1.0
        self.memory: Tensor | None = None
        self.received: Tensor | None = None
        self.module: nn.Module | None = None
        self._warmup_steps = warmup_steps
        self._undoable = undoable
        self._before: dict[str, Any] | None = None
        self._meter = meter
        self._watcher = watcher

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
        if self._undoable:
            self._before = {name: _copy(value) for name, value in self.state_dict().items()}
        if self.scale != 1.0:
            flat = flat * self.scale
        if self.step < self._warmup_steps:
            total = torch.empty(size, dtype=flat.dtype, device=flat.device)
            wires.wait(wires.reduce_scatter(total, flat, "reduce-scatter of sharded gradients"))
        else:
            self._make_memory(flat, size)
            total = self._exchange(flat, size, wires)
        self.step += 1
        if op == dist.ReduceOp.AVG:
            total.div_(wires.ranks)
        output_tensor.copy_(total.view(output_tensor.shape))

    def undo(self) -> None:
        """The last call counts as not made, because its gradients are thrown away; all ranks must agree on it.

        Nothing happens if there was none since the last time, as for a module that no step used.

        Raises:
            RuntimeError: The object is not ``undoable``.
        """
        if not self._undoable:
            raise RuntimeError("nothing was kept to undo a step with: make the reduce-scatter with undoable=True")
        if self._before is not None:
            self.load_state_dict(self._before)
            self._before = None

    def settle(self) -> None:
        """The last call stands: its gradients were made use of."""
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        """The step, and the memories that there are; not copies."""
        memories = {"memory": self.memory, "received": self.received}
        return {"step": self.step, **{name: tensor for name, tensor in memories.items() if tensor is not None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; ``{"step": N}`` alone starts from empty memories."""
        self.step = int(state["step"])
        self.memory = _copy(state.get("memory"))
        self.received = _copy(state.get("received"))

    def load_debts(self, states: Sequence[dict[str, Any]]) -> bool:
        """Take over what another number of ranks owed: the sum of all memories stays what it was.

        Args:
            states: What :meth:`state_dict` gave on each of the old ranks, in rank order.

        Returns:
            Whether the memories belong to :attr:`module` and this kind of error feedback; if not, they start empty.
        """
        self.step = int(states[0]["step"])
        self.memory = self.received = self._before = None
        saved = [state["memory"] for state in states if "memory" in state]
        if not saved and not any("received" in state for state in states):
            return True  # nothing was compressed yet
        layout = None if self.module is None else ShardLayout.of(self.module)
        estimates = self._rule.kind == "ef21"
        if (
            not self._remembers
            or layout is None
            or any(("received" in state) != estimates for state in states)
            or [memory.numel() for memory in saved] != [layout.numel(len(states))] * len(states)
        ):
            return False
        total = layout.relaid(torch.stack(saved).sum(dim=0), len(states))
        self.memory = total / layout.ranks
        if estimates:
            self.received = total.view(layout.ranks, -1)[layout.rank].clone()
        return True

    def _make_memory(self, flat: Tensor, size: int) -> None:
        """Empty memories before the first compressed call; a memory of another size is refused."""
        if self._remembers and self.memory is None:
            self.memory = torch.zeros(flat.numel(), dtype=memory_dtype(flat.dtype), device=flat.device)
            if self._rule.kind == "ef21":
                self.received = torch.zeros(size, dtype=self.memory.dtype, device=flat.device)
        if self.memory is None:
            return
        # A loaded memory lies where it was read to.
        self.memory = self.memory.to(flat.device)
        self.received = None if self.received is None else self.received.to(flat.device)
        if self.memory.numel() != flat.numel():
            raise ValueError(
                f"the error memory is for gradients of {self.memory.numel()} elements, these have {flat.numel()}; make "
                "a CompressedReduceScatter for each module, and call module.set_reduce_scatter_unused_params(True) "
                "where some parameters are not always used (compress_fsdp does both)"
            )
        if self._rule.resets_at(self.step):
            self.memory.zero_()

    def _exchange(self, flat: Tensor, size: int, wires: Wires) -> Tensor:
        """This rank's part ``[size]`` of the sum of all ranks' ``flat``, as far as it was sent."""
        layout = self.algorithm.payload_layout(size)
        length = wire_bytes(layout)
        out = torch.empty(length * wires.ranks, dtype=torch.uint8, device=flat.device)
        arrived = torch.empty_like(out)
        for rank, wire in enumerate(out.view(wires.ranks, length)):
            # A linear algorithm's places must be those of all; any other's may be its own.
            place = (rank,) if self.algorithm.linear else (wires.rank, rank)
            algorithm = self.algorithm.keyed("reduce-scatter", self.step, *place)
            part = flat[rank * size : (rank + 1) * size]
            if self.memory is None:
                payload = algorithm.compress(part)
            else:
                owed = self.memory[rank * size : (rank + 1) * size]
                payload = compress_with_feedback(algorithm, part, owed, self._rule)
                if self.received is not None and is_finite(payload):
                    algorithm.decompress_add(payload, owed)
            write_wire(wire, payload, layout)
        wires.wait(wires.all_to_all(arrived, out, [length] * wires.ranks, "compressed reduce-scatter"))
        total = torch.zeros(size, dtype=memory_dtype(flat.dtype), device=flat.device)
        for wire in arrived.view(wires.ranks, length):
            payload = wire_views(wire, layout)
            # The estimate is of what was finite, on both ends; what was not is seen this once.
            kept = self.received if self.received is not None and is_finite(payload) else total
            self.algorithm.decompress_add(payload, kept)
        return total if self.received is None else total.add_(self.received)


class CompressedAllGather:
    """Every rank's shard, compressed on the way: quantised weights in FSDP2's forward and backward passes.

    All ranks, the sender included, see the decompressed values, so they compute with the same weights; the shards that
    the optimizer updates keep every bit. Fits FSDP2's ``set_custom_all_gather``.

    Args:
        algorithm: An elementwise one; ``bf16``, ``fp8`` and ``int8`` suit weights.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Raises:
        ValueError: The algorithm needs whole matrices, leaves most elements out, or rounds at random.
    """

    def __init__(
        self, algorithm: CompressionAlgorithm, *, meter: Meter | None = None, watcher: Watcher | None = None
    ) -> None:
        check_for_weights(algorithm)
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
        """Fill ``output_tensor`` ``[ranks * n]`` with the ranks' ``input_tensor`` ``[n]``.

        Raises:
            ValueError: What is gathered is not floating: FSDP2 gathers parameters of several dtypes as bytes.
        """
        if not input_tensor.is_floating_point():
            raise ValueError(
                f"only floating weights are compressed, these are gathered as {input_tensor.dtype}, as FSDP2 does with "
                "parameters of several dtypes; call fully_shard on modules of one dtype, or leave their weights as "
                "they are"
            )
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
    error_feedback: bool | FeedbackRule = True,
    warmup_steps: int = 0,
    meter: Meter | None = None,
    watcher: Watcher | None = None,
) -> dict[str, CompressedReduceScatter]:
    """Compress what a model sharded by ``fully_shard`` sends.

    Args:
        model: With :class:`torch.distributed.fsdp.FSDPModule` modules in it.
        gradients: Of the reduce-scatter; None leaves it as it is.
        weights: Of the all-gather; None leaves it as it is.
        error_feedback: For gradients; a :class:`FeedbackRule` says how.
        warmup_steps: Steps at the start whose gradients go uncompressed.
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
            made[name] = CompressedReduceScatter(
                gradients, error_feedback=error_feedback, warmup_steps=warmup_steps, meter=meter, watcher=watcher
            )
            install(module, made[name])
        if weights is not None:
            gather = CompressedAllGather(weights, meter=meter, watcher=watcher)
            module.set_custom_all_gather(gather)  # type: ignore[arg-type]
    return made


def install(module: FSDPModule, scatter: CompressedReduceScatter) -> None:
    """Have ``scatter`` reduce a module's gradients, always all of them: those of unused parameters as zeros."""
    assert isinstance(module, nn.Module)  # FSDP2 makes a module one of its own kind, too
    scatter.module = module
    module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
    module.set_reduce_scatter_unused_params(True, recurse=False)


def check_for_weights(algorithm: CompressionAlgorithm) -> None:
    """Raise ``ValueError`` for an algorithm that weights cannot be compressed with."""
    refuse_shaped(algorithm)
    if algorithm.sparse or isinstance(algorithm, RandomK):
        raise ValueError(f"{algorithm.name} would set most weights to zero; take fp8, int8 or the like for weights")
    if algorithm.options().get("stochastic"):
        raise ValueError(
            f"{algorithm.name} with stochastic=True would round weights otherwise in the backward pass than in the "
            "forward pass; leave stochastic out for weights"
        )


def refuse_shaped(algorithm: CompressionAlgorithm) -> None:
    """Raise ``ValueError`` for an algorithm that needs whole matrices."""
    if algorithm.shaped:
        raise ValueError(f"{algorithm.name} compresses whole matrices, and a shard is none; take another algorithm")


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
