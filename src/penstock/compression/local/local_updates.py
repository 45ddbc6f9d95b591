"""Replicas that train apart and meet now and then: a context around any optimizer.

Between two meetings each replica steps with its own gradients, so nothing is sent; what is exchanged every ``period``
steps is how far each has come, once. The classes beside this module are settings of :class:`LocalUpdates`, named after
the papers that propose them.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Self, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock._core.meter import Meter
from penstock._core.protocols import OwnsExchange
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.buckets import DEFAULT_BUCKET_BYTES, NamedParameter, make_buckets
from penstock.compression.error_feedback import memory_dtype
from penstock.compression.error_memory import empty_memories
from penstock.compression.group import ranks_of
from penstock.compression.local._anchored import AnchoredBucket
from penstock.compression.local._scaled_steps import ScaledSteps
from penstock.compression.local.fragment_schedule import FragmentSchedule
from penstock.compression.local.outer_step import OuterStep
from penstock.compression.rechunk import rechunked
from penstock.compression.registry import create_compression_algorithm
from penstock.compression.same_start import check_same_start

_log = logging.getLogger(__name__)

Fragments = int | Sequence[Iterable[nn.Parameter]]

_STEP, _MET, _IN_FLIGHT, _ARRIVED = "step", "met", "in_flight", "arrived"
_NOT_MEMORIES: Final = ("anchor", "outer_momentum", _ARRIVED)


class LocalOptions(TypedDict, total=False):
    """The keyword arguments of :class:`LocalUpdates` that all methods share."""

    algorithm: CompressionAlgorithm | str | None
    error_feedback: bool
    error_decay: float
    fragments: Fragments
    overlap: int
    mixing: float
    group: dist.ProcessGroup | None
    replicas: int | None
    bucket_bytes: int
    meter: Meter | None
    watcher: Watcher | None


class LocalUpdates:
    """Wraps an optimizer, so that its replicas' parameters are averaged every ``period`` steps.

    Use it as a context manager around the training loop, without DDP::

        with DiLoCo(optimizer, period=30) as local:
            for batch in batches:
                loss_of(model, batch).backward()
                optimizer.step()  # every 30th also exchanges
                optimizer.zero_grad()
            local.synchronize()  # whatever the last step was

    Every replica starts from the same parameters and makes the same number of steps. Between exchanges parameters
    differ. What all agree on are the *anchors*: the parameters of the last exchange, and
    :meth:`common_weights` puts them into the model for a while; evaluate and save there. Neither the optimizer's own
    state nor buffers (of batch norms, say) are exchanged.

    Parameter groups of the optimizer never share a bucket; put each tied weight, whose copies lie on several pipeline
    stages, in a group of its own.

    Args:
        optimizer: The inner one; it must not communicate itself. It has all its parameter groups already.
        period: Steps between two exchanges of the same parameters (H).
        outer: What is done with the average of the replicas' ways.
        algorithm: Compressor of a replica's way, or its registered name; None sends it as it is.
        error_feedback: Carry over what compression leaves out.
        error_decay: What was carried over is multiplied by this before it is added, in (0, 1]; 1 loses nothing.
        fragments: How many parts the parameters are cut into, which take turns; or the parts themselves, of which some
            may be empty. A number cuts the optimizer's parameters, in their order, into parts of about equal size.
        overlap: Steps for which the exchange of a fragment may be on its way while the replicas go on.
        mixing: How much of its own parameters a replica keeps when it receives the common ones, in [0, 1).
        group: The replicas; None is the default group, or one replica where there is none.
        replicas: How many there are; None asks the group. 1 exchanges nothing, whatever the group.
        bucket_bytes: Target size of a bucket.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Attributes:
        optimizer: The inner optimizer.
        schedule: Which fragment is sent and received after which step.
        step: Steps made.

    Raises:
        ValueError: An argument is out of range, or the optimizer communicates itself.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        period: int,
        *,
        outer: OuterStep,
        algorithm: CompressionAlgorithm | str | None = None,
        error_feedback: bool = True,
        error_decay: float = 1.0,
        fragments: Fragments = 1,
        overlap: int = 0,
        mixing: float = 0.0,
        group: dist.ProcessGroup | None = None,
        replicas: int | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        if isinstance(optimizer, OwnsExchange):
            raise ValueError(
                f"{type(optimizer).__name__} exchanges at every step itself; local updates need an optimizer that does "
                "not communicate, such as torch.optim.AdamW"
            )
        if not 0.0 < error_decay <= 1.0:
            raise ValueError(f"error_decay must be in (0, 1], got {error_decay}")
        if not 0.0 <= mixing < 1.0:
            raise ValueError(f"mixing must be in [0, 1), got {mixing}: with 1 a replica would never hear of the others")
        count = fragments if isinstance(fragments, int) else len(fragments)
        self.schedule = FragmentSchedule(period, count, overlap)
        self.optimizer = optimizer
        self.outer = outer
        self.mixing = mixing
        self.step = 0
        self._anchored = False
        self._in_flight: list[_InFlight] = []
        compressor = create_compression_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
        alone = (ranks_of(group) if replicas is None else replicas) == 1
        owner, sets = _sets(optimizer, fragments)
        layouts = make_buckets(sets, bucket_bytes=bucket_bytes, flat_dtype=memory_dtype, reverse=False)
        self._buckets = [
            AnchoredBucket(
                layout,
                outer,
                compressor,
                group,
                alone=alone,
                error_feedback=error_feedback,
                error_decay=error_decay,
                meter=meter,
                watcher=watcher,
            )
            for layout in layouts
        ]
        self._fragments: list[list[AnchoredBucket]] = [[] for _ in range(count)]
        self._met = [0] * count  # the step after which a fragment was last sent and at once adopted
        for bucket in self._buckets:
            self._fragments[owner[bucket.layout.set_index]].append(bucket)
        self._check_start = not alone
        self._start_check = partial(check_same_start, self._parameters(), group, meter=meter, watcher=watcher)
        self._scaled = ScaledSteps(optimizer)
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> Self:
        """From here on, exchanges follow the optimizer's steps."""
        if not self._hooks:
            self._hooks = [
                self.optimizer.register_step_pre_hook(self._before_step),
                self.optimizer.register_step_post_hook(self._after_step),
            ]
            self._scaled.attach()
        return self

    def detach(self) -> None:
        """The optimizer steps by itself again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._scaled.detach()

    @contextmanager
    def common_weights(self) -> Iterator[None]:
        """Within it the parameters are the anchors, on which all replicas agree."""
        if not self._anchored:  # no step was made yet: they are
            yield
            return
        own = [(parameter, parameter.detach().clone()) for parameter in self._parameters()]
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.adopt()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in own:
                    parameter.copy_(value)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange everything now, whatever the step: after it parameters and anchors are the same on all replicas.

        Collective. For the end of training: it moves the anchors as any exchange does. What was exchanged after the
        last step is left alone: the outer momentum would move it once more, from no new gradient.
        """
        self._drop_anchors()
        for flight in list(self._in_flight):
            self._receive(flight)
        for fragment in range(len(self._fragments)):
            if self._met[fragment] != self.step:
                self._receive(self._send(fragment), mixing=0.0)

    def common_state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """What is the same on all replicas, by parameter: ``anchor`` and ``outer_momentum`` (if any), as views."""
        result: dict[nn.Parameter, dict[str, Tensor]] = {}
        for bucket in self._buckets:
            for index, parameter in enumerate(bucket.layout.parameters):
                result[parameter] = {"anchor": bucket.anchor_views[index]}
                if bucket.momentum is not None:
                    result[parameter]["outer_momentum"] = bucket.momentum_views[index]
        return result

    def anchors_are_known(self) -> None:
        """Say that :meth:`common_state` was filled in: the next step does not take the parameters as anchors."""
        self._anchored = True
        self._check_start = False

    def rank_state(self) -> dict[str, Any]:
        """What belongs to this replica alone, beside its parameters and its optimizer: steps, error memories, arrivals.

        A collective if something is on its way: it is received into the state (and applied when it is due).
        """
        self._settle()
        state: dict[str, Any] = {
            _STEP: self.step,
            _MET: list(self._met),
            _IN_FLIGHT: [[flight.fragment, flight.sent_after] for flight in self._in_flight],
        }
        state.update(self._memories())
        for flight in self._in_flight:
            for index, bucket in self._numbered(flight.fragment):
                state[f"bucket_{index:03d}.{_ARRIVED}"] = bucket.exchanged
        return state

    @torch.no_grad()
    def load_rank_state(self, state: Mapping[str, Any]) -> bool:
        """Restore what :meth:`rank_state` gave, in place.

        Returns:
            False if the memories belong to another layout: then they start from zero, and a warning is logged.
        """
        self._settle()
        self._in_flight.clear()
        self.step = int(state[_STEP])
        self._met = [int(step) for step in state.get(_MET, [-1] * len(self._fragments))]
        mine = self._memories()
        theirs = _memories_in(state)
        fits = mine.keys() == theirs.keys() and all(mine[name].shape == theirs[name].shape for name in mine)
        if not fits:
            _log.warning(
                "the saved error memories (%d tensors) do not fit this run's buckets (%d tensors); starting with empty "
                "memories",
                len(theirs),
                len(mine),
            )
            empty_memories(mine)
        for name, memory in mine.items() if fits else ():
            memory.copy_(theirs[name])
        for fragment, sent_after in state.get(_IN_FLIGHT, []):
            for index, bucket in self._numbered(fragment):
                bucket.exchanged.copy_(state[f"bucket_{index:03d}.{_ARRIVED}"])
            self._in_flight.append(_InFlight(fragment, sent_after, launched=2))
        return fits

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> bool:
        """Take over what another number of replicas owed, all in all the same; what was on its way is dropped.

        Args:
            states: :meth:`rank_state` of every old replica, in the order of the ranks.

        Returns:
            As for :meth:`load_rank_state`.
        """
        owed = [_memories_in(state) for state in states]
        memories = {f"bucket_{i:03d}": b.memory for i, b in enumerate(self._buckets) if b.memory is not None}
        replicas = self._buckets[0].replicas if self._buckets else 1
        return self.load_rank_state({_STEP: states[0][_STEP], **rechunked(owed, memories, replicas=replicas)})

    def state_dict(self) -> dict[str, Any]:
        """All of it, but for the parameters and the optimizer, which have state dicts of their own; not copies.

        As :meth:`rank_state`, a collective if something is on its way.
        """
        state = self.rank_state()
        for index, bucket in enumerate(self._buckets):
            state[f"bucket_{index:03d}.anchor"] = bucket.anchor
            if bucket.momentum is not None:
                state[f"bucket_{index:03d}.outer_momentum"] = bucket.momentum
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; load each replica's own parameters and optimizer, too.

        Raises:
            ValueError: Anchors or momenta are of other parameters, fragments or buckets.
        """
        for index, bucket in enumerate(self._buckets):
            for name, mine in (("anchor", bucket.anchor), ("outer_momentum", bucket.momentum)):
                theirs = state.get(f"bucket_{index:03d}.{name}")
                if mine is None and theirs is None:
                    continue
                if mine is None or theirs is None or mine.shape != theirs.shape:
                    raise ValueError(
                        f"the saved {name} of bucket {index} does not fit: parameters, fragments, the outer momentum "
                        "or bucket_bytes changed; make the local updates as they were made then"
                    )
                mine.copy_(theirs)
        self.load_rank_state(state)
        self.anchors_are_known()

    def _before_step(self, *_: object) -> None:
        if self._check_start:
            self._start_check()
            self._check_start = False
        with torch.no_grad():
            self._drop_anchors()
            self._scaled.before_step()

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        self._scaled.after_step()
        self.step += 1
        for flight in list(self._in_flight):
            if flight.sent_after + self.schedule.overlap == self.step:
                self._receive(flight)
        for flight in self._in_flight:
            if flight.sent_after + max(1, self.schedule.overlap // 2) == self.step:
                self._advance(flight)
        fragment = self.schedule.sent_after(self.step)
        if fragment is not None:
            flight = self._send(fragment)
            if self.schedule.overlap == 0:
                self._receive(flight)

    def _drop_anchors(self) -> None:
        if not self._anchored:
            for bucket in self._buckets:
                bucket.drop_anchor()
            self._anchored = True

    def _send(self, fragment: int) -> "_InFlight":
        for bucket in self._fragments[fragment]:
            bucket.start(self.step)
        flight = _InFlight(fragment, self.step)
        self._in_flight.append(flight)
        return flight

    def _advance(self, flight: "_InFlight") -> None:
        if flight.launched == 0:
            for bucket in self._fragments[flight.fragment]:
                bucket.advance()
            flight.launched = 1

    def _arrive(self, flight: "_InFlight") -> None:
        self._advance(flight)
        if flight.launched == 1:
            for bucket in self._fragments[flight.fragment]:
                bucket.wait()
            flight.launched = 2

    def _receive(self, flight: "_InFlight", *, mixing: float | None = None) -> None:
        self._arrive(flight)
        self._in_flight.remove(flight)
        # The exchanged values have the same bits on every replica, so all of them raise or none does.
        if not all(bucket.exchanged_is_finite() for bucket in self._fragments[flight.fragment]):
            raise FloatingPointError(
                f"after step {self.step}: some replica's parameters were not finite when fragment {flight.fragment} "
                f"was sent after step {flight.sent_after}; the common weights (common_weights()) are those before it, "
                "from which to go on with a lower learning rate"
            )
        kept = self.mixing if mixing is None else mixing
        if flight.sent_after == self.step and kept == 0.0:
            self._met[flight.fragment] = self.step
        for bucket in self._fragments[flight.fragment]:
            bucket.move_anchor()
            bucket.adopt(kept)

    def _settle(self) -> None:
        """Wait for what is on its way; it is applied when it is due, and the bits do not depend on when it came."""
        for flight in self._in_flight:
            self._arrive(flight)

    def _memories(self) -> dict[str, Tensor]:
        return {
            f"bucket_{index:03d}.{name}": tensor
            for index, bucket in enumerate(self._buckets)
            if bucket.memory is not None
            for name, tensor in bucket.memory.tensors().items()
        }

    def _numbered(self, fragment: int) -> list[tuple[int, AnchoredBucket]]:
        return [(self._buckets.index(bucket), bucket) for bucket in self._fragments[fragment]]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for bucket in self._buckets for parameter in bucket.layout.parameters]


class _InFlight:
    """A fragment on its way; ``launched`` counts collectives: 0 the first, 1 also the second, 2 both are done."""

    def __init__(self, fragment: int, sent_after: int, *, launched: int = 0) -> None:
        self.fragment = fragment
        self.sent_after = sent_after
        self.launched = launched


def _memories_in(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in state.items() if name.startswith("bucket_") and not name.endswith(_NOT_MEMORIES)
    }


def _sets(optimizer: Optimizer, fragments: Fragments) -> tuple[list[int], list[list[NamedParameter]]]:
    """Named parameters by fragment and parameter group, and which fragment each set belongs to.

    Raises:
        ValueError: The fragments given are not the optimizer's parameters, each once.
    """
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(fragments, int):
        fragment_of = _cut(everything, fragments)
    else:
        listed = [(id(p), index) for index, fragment in enumerate(fragments) for p in fragment]
        fragment_of = dict(listed)
        if len(fragment_of) != len(listed) or fragment_of.keys() != {id(p) for p in everything}:
            raise ValueError(
                f"the fragments hold {len(listed)} parameters ({len(fragment_of)} different ones), the optimizer "
                f"{len(everything)}; put each of the optimizer's parameters into one fragment"
            )
    owner: list[int] = []
    sets: list[list[NamedParameter]] = []
    for fragment in range(fragments if isinstance(fragments, int) else len(fragments)):
        for number, group in enumerate(optimizer.param_groups):
            named = [
                (f"group {number}, parameter {index}", p)
                for index, p in enumerate(group["params"])
                if fragment_of[id(p)] == fragment
            ]
            if named:
                owner.append(fragment)
                sets.append(named)
    return owner, sets


def _cut(parameters: list[nn.Parameter], parts: int) -> dict[int, int]:
    """Each parameter's part: consecutive ones, of about equal numbers of elements."""
    total = sum(p.numel() for p in parameters)
    part_of, before = {}, 0
    for parameter in parameters:
        middle = before + parameter.numel() / 2
        part_of[id(parameter)] = min(parts - 1, int(middle * parts / total)) if total else 0
        before += parameter.numel()
    return part_of
