"""Sums gradients over the data-parallel replicas while the backward pass still runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.algorithms.powersgd import PowerSGD
from penstock.compression.bucket_slot import BucketSlot
from penstock.compression.buckets import DEFAULT_BUCKET_BYTES, Bucket, NamedParameter, make_buckets
from penstock.compression.error_feedback import FeedbackRule, memory_dtype
from penstock.compression.error_memory import empty_memories
from penstock.compression.group import rank_in, ranks_of
from penstock.compression.masks import check_masks
from penstock.compression.rechunk import rechunked
from penstock.compression.reduction import finish_all
from penstock.compression.rules import ParameterRules, split_by
from penstock.compression.same_start import check_same_start


class Reducer:
    """A :class:`~penstock._core.protocols.GradientExchange` that reduces buckets in one fixed order.

    A bucket starts when all its gradients are final *and* every earlier bucket has started: the order is that of the
    list, the same on every rank, whatever order autograd takes. When a bucket has started, every earlier one goes one
    collective further: so second collectives run under the backward pass too, and their order is again the same on
    every rank, which one by readiness would not be.

    The result is ``sum over replicas of weight * gradient``. The weight is applied before compression, so error
    memories are in units of the final gradient. A gradient that is None counts as zeros; a parameter that does not
    require one is left alone.

    Args:
        parameter_sets: Named parameters in sets; parameters of different sets never share a bucket. Put each tied
            weight in a set of its own, and sets whose gradients become final last at the end.
        group: The replicas; None is the default group.
        algorithm: None for no compression (then gradients are summed in their own dtype).
        error_feedback: Keep what compression leaves out for the next step; a :class:`FeedbackRule` says how.
        rules: Which parameters go in full precision, in buckets of their own; None compresses all.
        masks: By parameter name, where a gradient may ever be (True), of the parameter's shape or one that broadcasts
            to it, ``[rows, 1]`` for rows: elsewhere compression would make one of its scale, which is cut off.
        inside: With a hierarchical exchange, the ranks of this machine, summed over in full precision; ``group`` is
            then made of the ranks with this one's place on the other machines. Shards of the sum are compressed.
        bucket_bytes: Target size of a bucket.
        warmup_steps: Steps at the start that go uncompressed.
        undoable: Keep a copy of the memories as they were before each step, for :meth:`undo`.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.
    """

    averages_gradients = True

    def __init__(
        self,
        parameter_sets: Sequence[Sequence[NamedParameter]],
        *,
        group: dist.ProcessGroup | None = None,
        algorithm: CompressionAlgorithm | None = None,
        error_feedback: bool | FeedbackRule = True,
        rules: ParameterRules | None = None,
        masks: Mapping[str, Tensor] | None = None,
        inside: dist.ProcessGroup | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        warmup_steps: int = 0,
        undoable: bool = False,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        if isinstance(algorithm, PowerSGD) and not error_feedback:
            raise ValueError(
                "powersgd without error feedback loses all but a few directions for good; set error_feedback: true"
            )
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self._warmup_steps = warmup_steps if algorithm is not None else 0
        self._step = 0
        # A compressor works on float32 whatever the parameters are; without one nothing is gained by widening.
        flat_dtype = memory_dtype if algorithm is not None and not algorithm.lossless else _same
        make_buckets(parameter_sets)  # refuses what is listed twice
        planned: list[tuple[Bucket, CompressionAlgorithm | None]] = []
        for named in parameter_sets:
            rest, full = split_by(rules, named)
            planned += [
                (bucket, algorithm) for bucket in make_buckets([rest], bucket_bytes=bucket_bytes, flat_dtype=flat_dtype)
            ]
            planned += [(bucket, None) for bucket in make_buckets([full], bucket_bytes=bucket_bytes)]
        known = {name for named in parameter_sets for name, _ in named}
        check_masks(masks or {}, known)
        self._machines = ranks_of(group)
        self._inside = (0, 1) if inside is None else (rank_in(inside), ranks_of(inside))
        self._slots = [
            BucketSlot(
                bucket,
                chosen,
                group,
                feedback=error_feedback,
                masks=masks or {},
                inside=inside,
                uncompressed_first=self._warmup_steps > 0,
                meter=meter,
                watcher=watcher,
            )
            for bucket, chosen in planned
        ]
        self._before = {name: memory.clone() for name, memory in self._memories().items()} if undoable else None
        self._done = False
        self._slot_of = {p: slot for slot in self._slots for p in slot.bucket.parameters}
        self._armed: set[nn.Parameter] = set()
        self._check_start: Callable[[], None] | None = lambda: check_same_start(
            list(self._slot_of), group, meter=meter, watcher=watcher
        )
        self._started = 0
        self._ask_weight: Callable[[], float] | None = None
        self._weight: float | None = None
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._accumulated) for p in self._slot_of if p.requires_grad
        ]

    @property
    def buckets(self) -> list[Bucket]:
        """The layout, in the order in which reductions start."""
        return [slot.bucket for slot in self._slots]

    def begin_step(self, weight: Callable[[], float]) -> None:
        """Forget the last step, finished or not; ``weight()`` is asked for when the first bucket starts.

        Raises:
            ValueError: Before the first step: the replicas hold different weights.
        """
        if self._check_start is not None:
            self._check_start()
            self._check_start = None
        self._armed.clear()
        self._started = 0
        self._done = False
        if self._before is not None:
            for name, memory in self._memories().items():
                self._before[name].copy_(memory)
        self._ask_weight = weight
        self._weight = None
        for slot in self._slots:
            slot.pending = {parameter for parameter in slot.bucket.parameters if parameter.requires_grad}

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        """The next gradient accumulated into each of these parameters is its last in this step.

        Raises:
            ValueError: A parameter is not one of this reducer's.
        """
        self._armed.update(self._known(parameters))

    def ready(self, parameters: Iterable[nn.Parameter]) -> None:
        """The gradients of these parameters are final now."""
        for parameter in self._known(parameters):
            self._armed.discard(parameter)
            self._slot_of[parameter].pending.discard(parameter)
        self._start_what_can()

    def finish(self) -> None:
        """Start the buckets that have not started, wait for all, and fill in every ``.grad``.

        Raises:
            RuntimeError: :meth:`begin_step` was not called.
        """
        if self._ask_weight is None:
            raise RuntimeError("finish() without begin_step(): the loss weight is not known")
        while self._started < len(self._slots):
            self._start_next()
        compressed = self._step >= self._warmup_steps
        finish_all(slot.reduction(compressed) for slot in self._slots)
        for slot in self._slots:
            slot.write_back()
        self._step += 1
        self._done = True
        self._armed.clear()
        self._ask_weight = None

    @torch.no_grad()
    def undo(self) -> None:
        """The step that :meth:`finish` ended counts as not made, because its gradients are thrown away.

        The memories and the step count are, to the bit, what they were: what was sent did not reach the weights. All
        replicas must agree on it.

        Raises:
            RuntimeError: No step was finished since the last call, or the reducer is not ``undoable``.
        """
        if self._before is None or not self._done:
            raise RuntimeError("no step to undo: make the reducer with undoable=True, and finish() a step first")
        for name, memory in self._memories().items():
            memory.copy_(self._before[name])
        self._step -= 1
        self._done = False

    def state_dict(self) -> dict[str, Any]:
        """The step count and, for each bucket, the error memories: ``bucket_000.worker``, ``bucket_000.server``."""
        state: dict[str, Any] = {"step": self._step}
        state.update(self._memories())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore, copying into existing storage; ``{"step": N}`` alone restores the step and empties the memories.

        Raises:
            ValueError: The memories are those of another layout (other parameters, bucket size or replicas).
        """
        mine = self._memories()
        theirs = {name: value for name, value in state.items() if name != "step"}
        differing = sorted(
            name
            for name in mine.keys() | theirs.keys()
            if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape
        )
        if theirs and differing:
            raise ValueError(
                f"the saved error memories do not fit: {', '.join(differing[:4])} "
                f"({len(differing)} of {len(mine)} differ). The number of replicas, the bucket size, the model or the "
                "algorithm changed; resume with the old values, or load {'step': N} alone to start with empty memories"
            )
        self._step = int(state["step"])
        for name, memory in mine.items():
            if theirs:
                memory.copy_(theirs[name])
        if not theirs:
            empty_memories(mine)
        self._done = False

    def load_debts(self, states: Sequence[dict[str, Any]]) -> bool:
        """Take over what another number of replicas owed: the sum of all memories stays what it was.

        Args:
            states: What :meth:`state_dict` gave on each of the old replicas, in rank order. With a hierarchical
                exchange there were as many of them to a machine as there are now.

        Returns:
            Whether the memories belong to this model and bucket size; if not, they start from zero.
        """
        mine = self._memories()
        self._step = int(states[0]["step"])
        self._done = False
        place, per_machine = self._inside
        states = states[place::per_machine]  # those that held the same shard, one on each machine
        memories = {f"bucket_{i:03d}": slot.memory for i, slot in enumerate(self._slots) if slot.memory is not None}
        theirs = [{name: value for name, value in state.items() if name != "step"} for state in states]
        found = rechunked(theirs, memories, replicas=self._machines, of_sum=True)
        fits = found.keys() == mine.keys() and all(found[name].shape == mine[name].shape for name in mine)
        if not fits:
            empty_memories(mine)
            return False
        for name, memory in mine.items():
            memory.copy_(found[name])
        return True

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _memories(self) -> dict[str, Tensor]:
        return {
            f"bucket_{index:03d}.{name}": tensor
            for index, slot in enumerate(self._slots)
            if slot.memory is not None
            for name, tensor in slot.memory.tensors().items()
        }

    def _known(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        known = list(parameters)
        for parameter in known:
            if parameter not in self._slot_of:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not one of this reducer's; "
                    "give it to the reducer when it is made"
                )
        return known

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if parameter in self._armed:
            self._armed.discard(parameter)
            self._slot_of[parameter].pending.discard(parameter)
            self._start_what_can()
        elif self._ask_weight is not None and parameter not in self._slot_of[parameter].pending:
            # Its reduction may be under way without this part.
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} got another gradient after its last one in this step; "
                "a module used twice must not be checkpointed with use_reentrant=True: take use_reentrant=False"
            )

    def _start_what_can(self) -> None:
        while self._started < len(self._slots) and not self._slots[self._started].pending:
            self._start_next()

    def _start_next(self) -> None:
        if self._weight is None:
            if self._ask_weight is None:
                raise RuntimeError("a gradient became final before begin_step()")
            self._weight = float(self._ask_weight())
        slot = self._slots[self._started]
        self._started += 1
        slot.fill(self._weight)
        compressed = self._step >= self._warmup_steps
        slot.reduction(compressed).start(self._step)
        for earlier in self._slots[: self._started - 1]:
            earlier.reduction(compressed).advance()


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype
