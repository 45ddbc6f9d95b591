"""Measures a model's layers on the processes of a run, all of them computing at once as they will."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch

from penstock._core.batch_key import BatchKey
from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.pipe.broadcast import broadcast_value
from penstock.pipe.groups import PipeGroups
from penstock.pipe.layer_spec import TiedLayerSpec
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.module import LayerSpec, PipelineModule
from penstock.pipe.planner import Flow, LayerCosts, Profile, measure_layers, plan_bounds, predict, run_through
from penstock.pipe.planner.profile import layer_from_json
from penstock.pipe.schedule import Schedule, get_schedule
from penstock.pipe.stage import Stage
from penstock.pipe.topology import ProcessTopology
from penstock.pipe.value import map_tensors, to_device
from penstock.runtime.batches import collate_samples, labelled
from penstock.runtime.compiling import compile_layers
from penstock.runtime.config import TrainConfig
from penstock.runtime.engine_costs import EngineCosts
from penstock.runtime.process import Process
from penstock.runtime.rehearsal import Rehearsal, gathered, rehearse

_LEAST_ROUNDS, _LEAST_S, _MOST_S = 7, 1.0, 20.0
_LONGEST_REHEARSAL: Final = 32
"""Micro-batches of a rehearsed step, where the run's steps have more."""
_REHEARSAL_S: Final = 2.0
_READINGS: Final = 5
_MOMENTS: Final = 2
"""Optimizer state that is reckoned with before an optimizer is there, in tensors for each parameter."""
_NAMES: Final = {"F": "forward", "B": "backward", "I": "input_gradient", "W": "weight_gradient"}
_TIMES: Final = (*_NAMES.values(), "update")


@dataclass
class Profiler:
    """Measures the layers of one model, for any sizes of micro-batch. Every rank of the run makes one.

    Each pipeline rank measures a share of the layers that takes about as long as the others': first one by one, for
    what each takes beside the others; then in steps as a run has them, for what all of them take together.

    Attributes:
        module: The model.
        config: The run's.
        loss_fn: None where the model returns its loss.
        groups: Of the run's ranks.
        device: Where this rank computes.
        dtype: Of parameters.
        autocast_dtype: See :class:`~penstock.pipe.stage.Stage`.
        watcher: Told of every wait.
        overhead: Seconds that a step takes besides its passes and its update; see
            :func:`~penstock.runtime.engine_costs.step_overhead`.
        memory: What each rank may take, in bytes: steps that would take more are rehearsed with every layer recomputed.
            None is no limit.
    """

    module: PipelineModule
    config: TrainConfig
    loss_fn: Callable[[Any, Any], Any] | None
    groups: PipeGroups
    device: torch.device
    dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    watcher: Watcher
    overhead: float = 0.0
    memory: int | None = None

    def __post_init__(self) -> None:
        self._division = self.module.divided_by("parameters", self.groups.num_pipe_ranks)
        self._stage = self._built()
        self._meter = Meter()
        self._rounds = 0
        engine = EngineCosts(self.groups, self.watcher, self.device, self._meter)
        self._latency, self._seconds_per_byte = engine.message()
        self._action, self._inside = engine.action()

    def profile(self, size: int, batch: tuple[Any, Any], *, reading: float = 0.0, split: bool = True) -> Profile:
        """Measure with micro-batches of ``size`` rows, of which ``batch`` is one: inputs and targets. Collective.

        Args:
            size: Rows.
            batch: Inputs and targets.
            reading: Seconds that reading such a batch took.
            split: Whether to rehearse split backward passes, too.
        """
        if self.module.takes_labels and self.loss_fn is not None:
            batch = labelled(*batch), batch[1]
        if self._rounds == 0:
            self._divide_by_time(size, batch)
        profile = replace(self._measured(size, batch, least_s=_LEAST_S), reading=reading)
        configured = self.module.activation_checkpoint_interval or self.module.activation_checkpoint_layers
        recompute = bool(configured) or self._too_large(profile)
        rehearsed = self._rehearsed(self._schedule("1f1b", size), batch, recompute=recompute)
        times = dict(rehearsed.spans)
        if recompute and times:  # the backward pass ran the forward pass again
            times["B"] = max(times["B"] - times["F"], 0.0)
        if split and self.groups.num_pipe_ranks > 1 and not recompute:
            halves = self._rehearsed(self._schedule("zb_h1", size), batch, recompute=False).spans
            times |= {op: halves[op] for op in ("I", "W") if op in halves}
        profile = self._adjusted(profile, times, rehearsed)
        schedule = self._schedule("1f1b", size)
        assert self._division.bounds is not None
        alone = predict(profile, schedule, self._division.bounds, 1 if recompute else 0)
        rest = rehearsed.step - (alone.seconds - reading * schedule.micro_batches)
        return replace(profile, step=max(0.0, rest) + self.overhead)

    def _too_large(self, profile: Profile) -> bool:
        """Whether a rehearsal that keeps all activations would take more than there is, by what layers keep."""
        if self.memory is None:
            return False
        assert self._division.bounds is not None
        # Gradients are there already; as much again for each of two moments, before the optimizer has made any.
        layers = tuple(replace(layer, state=(1 + _MOMENTS) * layer.state) for layer in profile.layers)
        schedule = self._schedule("1f1b", profile.micro_batch_size)
        return max(predict(replace(profile, layers=layers), schedule, self._division.bounds).memory) > self.memory

    def _built(self) -> Stage:
        """This rank's stage of the division."""
        stage = self._division.build_stage(self.groups.pipe_rank, device=self.device, dtype=self.dtype)
        stage.activation_checkpoint_interval, stage.recomputed = 0, frozenset()
        stage.autocast_dtype = self.autocast_dtype
        compile_layers(self.config.compile, stage, split=True)
        return stage

    def _divide_by_time(self, size: int, batch: tuple[Any, Any]) -> None:
        """Look shortly, and go on with about equal times: then neighbours are as busy as in a run that was planned."""
        if self.groups.num_pipe_ranks == 1:
            return
        bounds = plan_bounds(self._measured(size, batch, least_s=0.0), self._schedule("1f1b", size))
        if bounds != self._division.bounds:
            self._division = self.module.divided_by(bounds, self.groups.num_pipe_ranks)
            self._stage = self._built()

    def _schedule(self, name: str, size: int) -> Schedule:
        """Of a rehearsal."""
        samples = self.config.train.global_batch_size // self.groups.num_replicas
        return get_schedule(name, self.groups.num_pipe_ranks, max(1, min(samples // size, _LONGEST_REHEARSAL)))

    def _measured(self, size: int, batch: tuple[Any, Any], *, least_s: float) -> Profile:
        """The layers one by one, without rehearsal. Collective."""
        inputs, targets = batch
        stage = self._stage
        key = BatchKey(self.config.seed, 0, 0)
        flow = self._brought(Flow.inputs(inputs), key)
        self._barrier()
        self._rounds += 1
        layers = measure_layers(
            stage,
            flow,
            names=[self.module.type_name(index) for index in range(stage.start, stage.stop)],
            targets=targets,
            loss_fn=self.loss_fn,
            key=key,
            more=self._more(f"penstock/profile/{self._rounds}", least_s),
            split=not self.config.compile.enabled,  # a compiled layer frees what a second half needs
        )
        for parameter in stage.parameters():
            parameter.grad = None
        return Profile(
            micro_batch_size=size,
            layers=tuple(self._gathered(self._with_parameters(layers))),
            latency=self._latency,
            seconds_per_byte=self._seconds_per_byte,
            action=self._action,
            concurrent=self.groups.topology.world_size(),
        )

    def _rehearsed(self, schedule: Schedule, batch: tuple[Any, Any], *, recompute: bool) -> Rehearsal:
        stage = self._stage
        stage.activation_checkpoint_interval = 1 if recompute else 0
        # Each its own memory, as batches that were read one after the other have.
        copies = [map_tensors(torch.clone, batch) for _ in range(schedule.micro_batches)]
        batches = [MicroBatch(inputs, targets, index) for index, (inputs, targets) in enumerate(copies)]
        try:
            return rehearse(
                stage,
                batches,
                schedule=schedule,
                optimizer=self.config.optimizer,
                groups=self.groups,
                loss_fn=self.loss_fn,
                watcher=self.watcher,
                seed=self.config.seed,
                compression=self.config.pipe.activation_compression,
                budget_s=_REHEARSAL_S,
            )
        finally:
            stage.activation_checkpoint_interval = 0

    def _adjusted(self, profile: Profile, times: dict[str, float], rehearsed: Rehearsal) -> Profile:
        """The layers scaled to what their stage took in the rehearsal, and their shares of its update. Collective."""
        stage = self._stage
        layers = profile.layers[stage.start : stage.stop]
        scale = {}
        for op, name in _NAMES.items():
            alone = sum(getattr(layer, name) for layer in layers)
            scale[name] = max(times[op] - self._inside, 0.0) / alone if op in times and alone else 1.0
        trained = self._trained_bytes()
        total = sum(trained.values())
        adjusted = [
            replace(
                layer,
                **{name: ratio * getattr(layer, name) for name, ratio in scale.items()},
                state=round(trained[index] * (1.0 + rehearsed.state_ratio)),
                update=rehearsed.update * trained[index] / total if total else 0.0,
            )
            for index, layer in enumerate(layers, stage.start)
        ]
        return replace(profile, layers=tuple(self._gathered(adjusted)))

    def _trained_bytes(self) -> dict[int, int]:
        """Of each layer here, the bytes of its trained parameters."""
        return {
            index: sum(p.nbytes for p in module.parameters() if p.requires_grad)
            for index, module in self._stage.canonical_modules()
        }

    def _brought(self, flow: Flow, key: BatchKey) -> Flow:
        """The input of this rank's share: each rank in turn computes its own and gives the result to all."""
        group = self.groups.pipeline
        if group is None:
            return flow
        for source in range(self.groups.num_pipe_ranks - 1):
            sent = None
            if source == self.groups.pipe_rank:
                made = run_through(self._stage, flow, key)
                sent = [made.value, list(made.wants)]
            value, wants = broadcast_value(
                sent, source=source, group=group, device=self.device, watcher=self.watcher, meter=self._meter
            )
            if source == self.groups.pipe_rank - 1:
                flow = Flow(value, tuple(wants))
        return flow

    def _more(self, name: str, least_s: float) -> Callable[[int], bool]:
        """Go on until every rank has enough, so that all compute as long as any measures."""
        store, ranks = self.groups.store, self.groups.topology.world_size()
        start = time.perf_counter()
        told = False

        def more(rounds: int) -> bool:
            nonlocal told
            spent = time.perf_counter() - start
            enough = (rounds >= _LEAST_ROUNDS and spent >= least_s) or (rounds >= 1 and spent >= _MOST_S)
            if not enough or store is None:
                return not enough
            if spent > _MOST_S + self.watcher.deadline_s:
                raise TimeoutError(f"other ranks did not finish measuring within {spent:.0f} s")
            there = int(store.add(name, 0 if told else 1))
            told = True
            return there < ranks

        return more

    def _with_parameters(self, layers: list[LayerCosts]) -> list[LayerCosts]:
        """The layers with their parameters and gradients."""
        modules = dict(self._stage.canonical_modules())
        trained = self._trained_bytes()
        result = []
        for index, layer in enumerate(layers, self._stage.start):
            spec, module = self.module.specs[index], modules[index]
            result.append(
                replace(
                    layer,
                    parameters=sum(t.nbytes for t in (*module.parameters(), *module.buffers())),
                    trained=self.module.parameter_counts[index],
                    state=trained[index],
                    tie=spec.key if isinstance(spec, TiedLayerSpec) else None,
                )
            )
        return result

    def _gathered(self, layers: list[LayerCosts]) -> list[LayerCosts]:
        """Every layer of the model; times are means over the replicas."""
        entry = {"pipe": self.groups.pipe_rank, "layers": [asdict(layer) for layer in layers]}
        found = gathered(entry, self.groups, self.watcher)
        result: list[LayerCosts] = []
        for rank in range(self.groups.num_pipe_ranks):
            copies = [[layer_from_json(layer) for layer in e["layers"]] for e in found if e["pipe"] == rank]
            for same in zip(*copies, strict=True):
                times = {name: statistics.mean(getattr(layer, name) for layer in same) for name in _TIMES}
                result.append(replace(same[0], **times))
        return self._pooled(result)

    def _pooled(self, layers: list[LayerCosts]) -> list[LayerCosts]:
        """Layers that are described alike take equally long, so their times are one sample: its mean.

        Each is a median already; with the mean they still add up to what the stages took.
        """
        kinds = [self._kind(index, layer) for index, layer in enumerate(layers)]
        pooled = []
        for kind, layer in zip(kinds, layers, strict=True):
            alike = [other for other_kind, other in zip(kinds, layers, strict=True) if other_kind == kind]
            times = {name: statistics.mean(getattr(other, name) for other in alike) for name in _TIMES}
            pooled.append(replace(layer, **times))
        return pooled

    def _kind(self, index: int, layer: LayerCosts) -> tuple[Any, ...]:
        spec = self.module.specs[index]
        description = repr(spec)
        if not isinstance(spec, LayerSpec) or " at 0x" in description:  # an object, which nothing else is like
            return (index,)
        ends = index == 0, index == len(self.module.specs) - 1
        return description, getattr(spec, "forward_fn", None), ends, layer.kept, layer.output, layer.state

    def _barrier(self) -> None:
        gathered(0.0, self.groups, self.watcher)


def divide_by_profile(
    module: PipelineModule,
    schedule: Schedule,
    micro_batch_size: int,
    batch: Callable[[], tuple[Any, Any]],
    **settings: Any,
) -> PipelineModule:
    """The model divided so that a step of this schedule is predicted to be shortest. Collective.

    Args:
        module: The model.
        schedule: The run's.
        micro_batch_size: The run's.
        batch: Gives a micro-batch to measure with.
        settings: The other attributes of a :class:`Profiler`.
    """
    split = any(action.op == "I" for action in schedule.ranks[0])
    profile = Profiler(module=module, **settings).profile(micro_batch_size, batch(), split=split)
    bounds = plan_bounds(profile, schedule, module.activation_checkpoint_interval, recomputed=module.recomputed)
    return module.divided_by(bounds, schedule.num_stages)


@contextmanager
def profiling_groups(
    topology: ProcessTopology, process: Process, watcher: Watcher, deadline_s: float
) -> Iterator[PipeGroups]:
    """Process groups to measure with, ended afterwards. Collective."""
    groups = PipeGroups(
        topology,
        rank=process.rank,
        timeout=timedelta(seconds=2 * deadline_s),
        device=process.device,
        watcher=watcher,
        store=process.store,
    )
    try:
        yield groups
    finally:
        groups.close()


def sample_batch(dataset: Any, order: Any, size: int, device: torch.device, collate: Any = None) -> tuple[Any, Any]:
    """The first ``size`` samples of a run as one micro-batch: inputs and targets."""
    rows = order.sample_at(np.arange(size, dtype=np.int64))
    inputs, targets = (collate or collate_samples)([dataset[int(row)] for row in rows])
    return to_device(inputs, device), to_device(targets, device)


def timed_batch(dataset: Any, order: Any, size: int, device: torch.device) -> tuple[tuple[Any, Any], float]:
    """:func:`sample_batch`, and the median of the seconds that it takes."""
    seconds = []
    for _ in range(_READINGS):
        start = time.perf_counter()
        batch = sample_batch(dataset, order, size, device)
        seconds.append(time.perf_counter() - start)
    return batch, statistics.median(seconds)
