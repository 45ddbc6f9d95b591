"""Compressed gradients for people who use DistributedDataParallel alone.

::

    model = DistributedDataParallel(model)
    model.register_comm_hook(DDPCompression(create_compression_algorithm("onebit")), ddp_compression_hook)

DDP hands its buckets to the hook in one fixed order. The hook launches each bucket's first collective at once, under
the rest of the backward pass, and takes every earlier bucket one collective further; the last bucket of the step
finishes them all. So many buckets are in flight and every rank issues the same sequence of collectives.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.algorithms.powersgd import PowerSGD
from penstock.compression.chunks import Part
from penstock.compression.error_feedback import CLASSIC, FeedbackRule, all_finite, memory_dtype
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.group import ranks_of
from penstock.compression.reduction import Reduction, finish_all, make_reduction

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
else:  # a compiled type: torch.distributed exports it at run time, and DDP checks the hook's annotation against it
    GradBucket = dist.GradBucket


class DDPCompression:
    """The state of :func:`ddp_compression_hook`.

    DDP rearranges its buckets once, after the first step; a bucket whose parameters change starts with an empty
    error memory. With ``warmup_steps`` of at least 1 nothing is lost by that.

    Where a ``GradScaler`` scales the loss, give it here: its scale changes the units of the gradients, and what was
    owed in the old units must not be paid in the new ones.

    Args:
        algorithm: None for no compression.
        group: The group that DDP was given; None is the default group. With ``inside``, the ranks with this one's place
            on the other machines.
        error_feedback: Keep what compression leaves out for the next step; a :class:`FeedbackRule` says how.
        warmup_steps: Steps at the start that go uncompressed.
        inside: The ranks of this machine, summed over in full precision, so that only shards of their sum are
            compressed and cross the network; with ``group``, what :func:`machine_groups` gives. DDP itself keeps the
            group of all ranks.
        scaler: What scales the loss, of one optimizer. Gradients are compressed in units of the unscaled loss, whatever
            the scale does. A step with a NaN or infinity anywhere, which the scaler has the optimizer skip, counts as
            not made: all memories are, to the bit, what they were before it (for which there is a copy of them).
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.
    """

    def __init__(
        self,
        algorithm: CompressionAlgorithm | None,
        *,
        group: dist.ProcessGroup | None = None,
        error_feedback: bool | FeedbackRule = True,
        warmup_steps: int = 0,
        inside: dist.ProcessGroup | None = None,
        scaler: torch.amp.GradScaler | None = None,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self.step = 0
        self.warmup_steps = warmup_steps
        self._algorithm = algorithm
        self._group = group
        self._inside = inside
        if inside is not None and algorithm is not None and algorithm.shaped and ranks_of(inside) > 1:
            raise ValueError(
                f"{algorithm.name} compresses whole matrices, but a hierarchical exchange cuts them into shards; "
                "take another algorithm, or leave inside out"
            )
        if isinstance(algorithm, PowerSGD) and not error_feedback:
            raise ValueError(
                "powersgd without error feedback loses all but a few directions for good; set error_feedback: true"
            )
        self._rule = error_feedback if isinstance(error_feedback, FeedbackRule) else CLASSIC
        self._error_feedback = bool(error_feedback) and algorithm is not None and not algorithm.lossless
        self._scaler = scaler
        self._scale = 1.0
        self._meter = meter
        self._watcher = watcher
        self._slots: dict[int, _Slot] = {}
        # A bucket names no parameters, so each gets the number of its first appearance. The first step of a run shows
        # DDP's first layout, which depends on the model alone: the numbers mean the same after a restart.
        self._numbers: dict[Tensor, int] = {}
        self._loaded: dict[str, Any] = {}
        self._in_flight: list[_Launched] = []

    def launch(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start one bucket's reduction; the last bucket of a step finishes them all."""
        buffer = bucket.buffer()
        slot = self._slot_for(bucket)
        if slot.flat.data_ptr() != buffer.data_ptr():
            slot.flat.copy_(buffer)
        scaled = self._scaler is not None and self._scaler.is_enabled()
        if scaled and not self._in_flight:
            assert self._scaler is not None
            self._scale = self._scaler.get_scale()
        reduction = slot.compressed if self.step >= self.warmup_steps else slot.plain
        if scaled:
            slot.keep_memory()
            slot.flat.div_(self._scale)
        reduction.start(self.step)
        for earlier in self._in_flight:
            earlier.reduction.advance()
        devices: list[int | str | torch.device] = [buffer.device] if buffer.device.type == "cuda" else []
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        self._in_flight.append(_Launched(reduction, slot, buffer, future))
        if bucket.is_last():
            launched, self._in_flight = self._in_flight, []
            finish_all(work.reduction for work in launched)
            for work in launched:
                work.finish(self._scale if scaled else 1.0)
            if scaled and not all(all_finite(work.buffer) for work in launched):
                for work in launched:
                    work.slot.restore_memory()
            else:
                self.step += 1
            for index in [index for index in self._slots if index > bucket.index()]:  # of the layout before
                del self._slots[index]
        return future

    def state_dict(self) -> dict[str, Any]:
        """The step count and, for each bucket, its error memories and the numbers of its parameters."""
        state: dict[str, Any] = {"step": self.step}
        for index, slot in sorted(self._slots.items()):
            if slot.memory is not None:
                state.update({f"bucket_{index:03d}.{name}": t for name, t in slot.memory.tensors().items()})
                state[f"bucket_{index:03d}.parameters"] = list(slot.numbers)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; a bucket gets its memories when DDP first shows it with the same parameters in the same order.

        A resumed DDP rearranges its buckets again after its first step. Memories of the rearranged buckets wait for
        that: nothing is lost, but such a resume is not bitwise; Penstock's own reducer, whose layout is fixed, is.
        """
        self.step = int(state["step"])
        self._slots.clear()
        self._loaded = {name: value for name, value in state.items() if name != "step"}

    def _slot_for(self, bucket: GradBucket) -> "_Slot":
        index, buffer = bucket.index(), bucket.buffer()
        numbers = tuple(self._numbers.setdefault(p, len(self._numbers)) for p in bucket.parameters())
        slot = self._slots.get(index)
        if slot is None or slot.numbers != numbers or slot.flat.numel() != buffer.numel():
            slot = self._slots[index] = self._new_slot(bucket, numbers, None)
            self._take_loaded(f"bucket_{index:03d}", slot)
        elif slot.flat.dtype == buffer.dtype and slot.flat.data_ptr() != buffer.data_ptr():
            slot = self._slots[index] = self._new_slot(bucket, numbers, slot.memory)
        return slot

    def _take_loaded(self, name: str, slot: "_Slot") -> None:
        """Move a loaded bucket's memories into its slot, once, if the bucket is the same."""
        if slot.memory is None or self._loaded.get(f"{name}.parameters") != list(slot.numbers):
            return
        for part, memory in slot.memory.tensors().items():
            saved = self._loaded.pop(f"{name}.{part}", None)
            if saved is not None and saved.shape == memory.shape:
                memory.copy_(saved)

    def _new_slot(self, bucket: GradBucket, numbers: tuple[int, ...], memory: ErrorMemory | None) -> "_Slot":
        buffer, parts, start = bucket.buffer(), [], 0
        for parameter in bucket.parameters():
            parts.append(Part(start, tuple(parameter.shape)))
            start += parameter.numel()
        compresses = self._algorithm is not None and not self._algorithm.lossless
        dtype = memory_dtype(buffer.dtype) if compresses else buffer.dtype
        # DDP keeps a bucket's buffer from step to step: where its precision will do, it is reduced in place.
        flat = buffer if dtype == buffer.dtype else torch.zeros_like(buffer, dtype=dtype)
        if self._error_feedback and memory is None:
            memory = ErrorMemory.for_tensor(
                flat, self._group, algorithm=self._algorithm, rule=self._rule, parts=parts, inside=self._inside
            )
        make = partial(
            make_reduction, flat, group=self._group, inside=self._inside, meter=self._meter, watcher=self._watcher
        )
        factor = 1.0 / (ranks_of(self._group) * (1 if self._inside is None else ranks_of(self._inside)))
        plain = compressed = make(algorithm=None, factor=factor)
        if self._algorithm is not None:
            compressed = make(algorithm=self._algorithm, memory=memory, parts=parts, factor=factor, key=bucket.index())
        return _Slot(numbers, flat, memory, plain, compressed)


def ddp_compression_hook(state: DDPCompression, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook for ``DistributedDataParallel.register_comm_hook``; gives the mean gradient."""
    return state.launch(bucket)


class _Slot:
    def __init__(
        self,
        numbers: tuple[int, ...],
        flat: Tensor,
        memory: ErrorMemory | None,
        plain: Reduction,
        compressed: Reduction,
    ) -> None:
        self.numbers = numbers
        self.flat = flat
        self.memory = memory
        self.plain = plain
        self.compressed = compressed
        self._before: dict[str, Tensor] = {}

    def keep_memory(self) -> None:
        if self.memory is None:
            return
        for name, tensor in self.memory.tensors().items():
            if name in self._before:
                self._before[name].copy_(tensor)
            else:
                self._before[name] = tensor.clone()

    def restore_memory(self) -> None:
        if self.memory is None:
            return
        for name, tensor in self.memory.tensors().items():
            tensor.copy_(self._before[name])


class _Launched:
    def __init__(self, reduction: Reduction, slot: _Slot, buffer: Tensor, future: torch.futures.Future[Tensor]) -> None:
        self.reduction = reduction
        self.slot = slot
        self.buffer = buffer
        self.future = future

    def finish(self, scale: float) -> None:
        self.reduction.wait()
        flat = self.slot.flat
        if scale != 1.0:
            flat.mul_(scale)
        if flat.data_ptr() != self.buffer.data_ptr():
            self.buffer.copy_(flat)
        self.future.set_result(self.buffer)
