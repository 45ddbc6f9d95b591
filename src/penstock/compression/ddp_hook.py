"""Compressed gradients for people who use DistributedDataParallel alone.

::

    model = DistributedDataParallel(model)
    model.register_comm_hook(DDPCompression(create_compression_algorithm("onebit")), ddp_compression_hook)

DDP hands its buckets to the hook in one fixed order. The hook launches each bucket's first collective at once, under
the rest of the backward pass, and takes every earlier bucket one collective further; the last bucket of the step
finishes them all. So many buckets are in flight and every rank issues the same sequence of collectives.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.algorithms.powersgd import PowerSGD
from penstock.compression.chunks import Part
from penstock.compression.ddp_slot import DDPSlot, Piece, Span
from penstock.compression.error_feedback import CLASSIC, FeedbackRule, all_finite, memory_dtype
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.group import rank_in, ranks_of
from penstock.compression.masks import check_masks, flat_mask
from penstock.compression.reduction import finish_all, make_reduction
from penstock.compression.rules import ParameterRules, split_by

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
else:  # a compiled type: torch.distributed exports it at run time, and DDP checks the hook's annotation against it
    GradBucket = dist.GradBucket

_log = logging.getLogger(__name__)
_WAITING: Final = "waiting."
"""Before the name of a bucket's memories that were loaded, while DDP shows another bucket in its place."""


class DDPCompression:
    """The state of :func:`ddp_compression_hook`.

    DDP rearranges its buckets once, after the first step; a bucket whose parameters change starts with an empty
    error memory. With ``warmup_steps`` of at least 1 nothing is lost by that.

    Where a ``GradScaler`` scales the loss, give it here: its scale changes the units of the gradients, and what was
    owed in the old units must not be paid in the new ones.

    Rules part a bucket: what they leave in full precision is summed by a collective of its own.

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
        rules: Which parameters go in full precision; None compresses all.
        masks: By parameter name, where a gradient may ever be (True), of the parameter's shape or one that broadcasts
            to it, ``[rows, 1]`` for rows: elsewhere compression would make one of its scale, which is cut off.
        named_parameters: What rules and masks call the parameters: ``model.named_parameters()`` of the model that DDP
            wraps.
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
        rules: ParameterRules | None = None,
        masks: Mapping[str, Tensor] | None = None,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
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
        self._rules = rules
        self._masks = dict(masks or {})
        if (rules is not None or masks) and named_parameters is None:
            raise ValueError(
                "rules and masks go by parameters' names, which DDP's buckets do not tell; give "
                "named_parameters=model.named_parameters(), of the model that DDP wraps"
            )
        self._names = {parameter: name for name, parameter in named_parameters or ()}
        check_masks(self._masks, set(self._names.values()))
        self._meter = meter
        self._watcher = watcher
        self._slots: dict[int, DDPSlot] = {}
        # A bucket names no parameters, so each gets the number of its first appearance. The first step of a run shows
        # DDP's first layout, which depends on the model alone: the numbers mean the same after a restart.
        self._numbers: dict[Tensor, int] = {}
        self._loaded: dict[str, Any] = {}
        self._loaded_at = 0
        self._in_flight: list[_Launched] = []

    def launch(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start one bucket's reduction; the last bucket of a step finishes them all."""
        buffer = bucket.buffer()
        slot = self._slot_for(bucket)
        scaled = self._scaler is not None and self._scaler.is_enabled()
        if scaled and not self._in_flight:
            assert self._scaler is not None
            self._scale = self._scaler.get_scale()
        for piece in slot.pieces:
            piece.fill(buffer)
            if scaled and piece.memory is not None:  # units matter to a memory alone, and 16 bits are too few for them
                piece.keep_memory()
                piece.flat.div_(self._scale)
        devices: list[int | str | torch.device] = [buffer.device] if buffer.device.type == "cuda" else []
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        launched = _Launched(slot, buffer, future, compressed=self.step >= self.warmup_steps)
        for reduction in launched.reductions:
            reduction.start(self.step)
        for earlier in self._in_flight:
            for reduction in earlier.reductions:
                reduction.advance()
        self._in_flight.append(launched)
        if bucket.is_last():
            everything, self._in_flight = self._in_flight, []
            finish_all(reduction for work in everything for reduction in work.reductions)
            for work in everything:
                work.finish(self._scale if scaled else 1.0)
            if scaled and not all(all_finite(work.buffer) for work in everything):
                for work in everything:
                    for piece in work.slot.pieces:
                        piece.restore_memory()
            else:
                self.step += 1
            self._drop_loaded()
            for index in [index for index in self._slots if index > bucket.index()]:  # of the layout before
                del self._slots[index]
        return future

    def state_dict(self) -> dict[str, Any]:
        """The step count and, for each bucket, its error memories and the numbers of its parameters.

        With what was loaded and waits for its bucket still.
        """
        state: dict[str, Any] = {"step": self.step, "rank": rank_in(None)}
        for index, slot in sorted(self._slots.items()):
            if slot.memory is not None:
                state.update({f"bucket_{index:03d}.{name}": t for name, t in slot.memory.tensors().items()})
                state[f"bucket_{index:03d}.parameters"] = list(slot.numbers)
        shown = {name.partition(".")[0] for name in state}
        for name, value in self._loaded.items():
            state.setdefault(_WAITING + name if name.partition(".")[0] in shown else name, value)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; a bucket gets its memories when DDP first shows it with the same parameters in the same order.

        A resumed DDP rearranges its buckets again after its first step. Memories of the rearranged buckets wait for
        that: nothing is lost, but such a resume is not bitwise; Penstock's own reducer, whose layout is fixed, is.

        Raises:
            ValueError: It is another rank's.
        """
        rank = rank_in(None)
        if state.get("rank", rank) != rank:
            raise ValueError(
                f"these are the error memories of rank {state['rank']}, but this is rank {rank}: "
                "they belong to a rank; save a file on each rank, and load it there"
            )
        self.step = int(state["step"])
        self._slots.clear()
        self._loaded = {name: value for name, value in state.items() if name not in ("step", "rank")}
        self._loaded_at = self.step

    def _slot_for(self, bucket: GradBucket) -> DDPSlot:
        index, buffer = bucket.index(), bucket.buffer()
        numbers = tuple(self._numbers.setdefault(p, len(self._numbers)) for p in bucket.parameters())
        slot = self._slots.get(index)
        if slot is None or slot.numbers != numbers or slot.numel != buffer.numel():
            slot = self._slots[index] = self._new_slot(bucket, numbers, None)
            self._take_loaded(f"bucket_{index:03d}", slot)
        elif any(piece.in_place and piece.flat.data_ptr() != buffer.data_ptr() for piece in slot.pieces):
            slot = self._slots[index] = self._new_slot(bucket, numbers, slot.memory)
        return slot

    def _take_loaded(self, name: str, slot: DDPSlot) -> None:
        """Move a loaded bucket's memories into its slot, once, if the bucket is the same."""
        if self._loaded.get(f"{name}.parameters") != list(slot.numbers):
            name = _WAITING + name
        if slot.memory is None or self._loaded.get(f"{name}.parameters") != list(slot.numbers):
            return
        saved = {key: self._loaded.pop(key) for key in list(self._loaded) if key.startswith(f"{name}.")}
        mine = slot.memory.tensors()
        if any(f"{name}.{part}" not in saved or saved[f"{name}.{part}"].shape != mine[part].shape for part in mine):
            _log.warning(
                "the saved error memories of DDP's %s do not fit: the number of ranks or the algorithm changed; "
                "starting with empty ones",
                name,
            )
            return
        for part, memory in mine.items():
            memory.copy_(saved[f"{name}.{part}"])

    def _drop_loaded(self) -> None:
        """DDP has shown its final layout: memories that no bucket has asked for by now belong to none."""
        if self._loaded and self.step >= self._loaded_at + 2:
            _log.warning(
                "saved error memories of %d buckets are of another layout of DDP's; starting with empty ones",
                sum(name.endswith(".parameters") for name in self._loaded),
            )
            self._loaded.clear()

    def _new_slot(self, bucket: GradBucket, numbers: tuple[int, ...], memory: ErrorMemory | None) -> DDPSlot:
        named, sources, start = [], {}, 0
        for parameter in bucket.parameters():
            name = self._name_of(parameter)
            named.append((name, parameter))
            sources[name] = start
            start += parameter.numel()
        sent, full = split_by(self._rules, named)
        pieces = [
            self._new_piece(bucket, chosen, sources, algorithm, memory)
            for chosen, algorithm in ((sent, self._algorithm), (full, None))
            if chosen
        ]
        return DDPSlot(numbers, start, pieces)

    def _new_piece(
        self,
        bucket: GradBucket,
        named: Sequence[tuple[str, Tensor]],
        sources: Mapping[str, int],
        algorithm: CompressionAlgorithm | None,
        memory: ErrorMemory | None,
    ) -> Piece:
        buffer, spans, numel = bucket.buffer(), [], 0
        for name, parameter in named:
            spans.append(Span(sources[name], numel, parameter.shape))
            numel += parameter.numel()
        compresses = algorithm is not None and not algorithm.lossless
        dtype = memory_dtype(buffer.dtype) if compresses else buffer.dtype
        # DDP keeps a bucket's buffer from step to step: where its precision will do, it is reduced in place.
        in_place = len(named) == len(sources) and dtype == buffer.dtype
        flat = buffer if in_place else torch.zeros(numel, dtype=dtype, device=buffer.device)
        parts = [Part(span.start, tuple(span.shape)) for span in spans]
        if not compresses or not self._error_feedback:
            memory = None
        elif memory is None:
            memory = ErrorMemory.for_tensor(
                flat, self._group, algorithm=algorithm, rule=self._rule, parts=parts, inside=self._inside
            )
        mask = None
        if compresses and self._masks:
            ones = torch.zeros_like(flat)
            mask = flat_mask(ones, [name for name, _ in named], [part.of(ones) for part in parts], self._masks)
        factor = 1.0 / (ranks_of(self._group) * (1 if self._inside is None else ranks_of(self._inside)))
        make = partial(
            make_reduction,
            flat,
            group=self._group,
            inside=self._inside,
            factor=factor,
            meter=self._meter,
            watcher=self._watcher,
        )
        plain = compressed = make(algorithm=None)
        if algorithm is not None:
            compressed = make(algorithm=algorithm, memory=memory, parts=parts, key=bucket.index())
        return Piece(spans, flat, in_place=in_place, memory=memory, mask=mask, plain=plain, compressed=compressed)

    def _name_of(self, parameter: Tensor) -> str:
        """What rules and masks call a parameter; its number where there are none."""
        if not self._names:
            return str(self._numbers[parameter])
        if parameter not in self._names:
            raise ValueError(
                f"named_parameters names {len(self._names)} parameters, but not this one of shape "
                f"{tuple(parameter.shape)} in DDP's bucket; give model.named_parameters() of the model that DDP wraps"
            )
        return self._names[parameter]


def ddp_compression_hook(state: DDPCompression, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook for ``DistributedDataParallel.register_comm_hook``; gives the mean gradient."""
    return state.launch(bucket)


class _Launched:
    def __init__(
        self, slot: DDPSlot, buffer: Tensor, future: torch.futures.Future[Tensor], *, compressed: bool
    ) -> None:
        self.slot = slot
        self.buffer = buffer
        self.future = future
        self.reductions = [piece.compressed if compressed else piece.plain for piece in slot.pieces]

    def finish(self, scale: float) -> None:
        for piece in self.slot.pieces:
            piece.write_back(self.buffer, scale)
        self.future.set_result(self.buffer)
