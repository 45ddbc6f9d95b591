"""Runs steps of one division of a model as a run would, on all its processes at once, and keeps what they took.

Layers that are timed one after the other find their input and their memory warm, and nobody beside them sends messages
or updates weights. A rehearsal has what they lack: the engine itself, several micro-batches in flight, neighbours that
compute, the optimizer between the steps.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock._core.waiting import Watcher
from penstock.compression import LocalGradients
from penstock.pipe.engine import PipelineEngine
from penstock.pipe.groups import PipeGroups
from penstock.pipe.loss import LossFn
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.schedule import Action, Schedule
from penstock.pipe.stage import Stage
from penstock.runtime.activation_codec import activation_codecs
from penstock.runtime.clipping import clip_, largest, squares
from penstock.runtime.gather import gather_json
from penstock.runtime.optimizer_section import OptimizerSection
from penstock.runtime.optimizers import parameter_groups

_WARM_UP: Final = 2
_LEAST, _MOST = 3, 15


@dataclass(frozen=True)
class Rehearsal:
    """What steps of one layout took, in seconds.

    Attributes:
        spans: By op, this rank's actions: their mean over the micro-batches, of which the first makes the gradients'
            memory; the median of that over the steps. Empty on a GPU, where an action ends before its kernels do.
        update: Scaling gradients, clipping, the optimizer and clearing on this rank.
        step: A whole step on the slowest rank.
        state_ratio: Bytes of optimizer state for each byte of trained parameters on this rank.
    """

    spans: dict[str, float]
    update: float
    step: float
    state_ratio: float


def rehearse(
    stage: Stage,
    batches: Sequence[MicroBatch],
    *,
    schedule: Schedule,
    optimizer: OptimizerSection,
    groups: PipeGroups,
    loss_fn: LossFn | None,
    watcher: Watcher,
    seed: int,
    compression: str,
    budget_s: float,
) -> Rehearsal:
    """Run steps of this rank's stage, each with the same micro-batches; weights stay as they are. Collective.

    Args:
        stage: With activation checkpointing or without.
        batches: Of one step.
        schedule: Of one stage per rank.
        optimizer: The run's.
        groups: Of the run's ranks.
        loss_fn: None where the model returns its loss.
        watcher: Told of every wait.
        seed: The run's.
        compression: Of activations between ranks; the run's.
        budget_s: About how long to go on, with 3 to 15 steps that count.
    """
    exchange = _Timed(stage.parameters(), replicas=1)
    engine = PipelineEngine(
        stage,
        schedule=schedule,
        micro_batches=len(batches),
        groups=groups,
        exchange=exchange,
        loss_fn=loss_fn,
        watcher=watcher,
        seed=seed,
        device=stage.device,
        codecs=activation_codecs(compression),
    )
    built = _built(stage, optimizer)
    actions = schedule.ranks[groups.pipe_rank]
    found: list[tuple[dict[str, float], float, float]] = []
    steps = _WARM_UP + _MOST
    number = 0
    while number < steps:
        engine.recorded = []
        start = time.perf_counter()
        engine.train_step(batches, step=number)
        _finish(stage.device)
        middle = time.perf_counter()
        update(stage, built, optimizer.gradient_clipping)
        _finish(stage.device)
        end = time.perf_counter()
        spans = {} if stage.device.type == "cuda" else _means(actions, engine.recorded)
        found.append((spans, end - middle + exchange.seconds, end - start))
        if number == _WARM_UP - 1:
            slowest = max(gathered(end - start, groups, watcher))
            steps = _WARM_UP + max(_LEAST, min(_MOST, int(budget_s / max(slowest, 1e-9))))
        number += 1
    counted = found[_WARM_UP:]
    wholes = zip(*gathered([whole for _, _, whole in counted], groups, watcher), strict=True)
    return Rehearsal(
        spans={op: statistics.median(spans[op] for spans, _, _ in counted) for op in counted[0][0]},
        update=statistics.median(update for _, update, _ in counted),
        step=statistics.median(max(step) for step in wholes),
        state_ratio=_state_ratio(stage, built),
    )


class _Timed(LocalGradients):
    """Says what scaling the gradients took, which is not waiting for anyone."""

    seconds = 0.0

    def finish(self) -> None:
        start = time.perf_counter()
        super().finish()
        self.seconds = time.perf_counter() - start


def _built(stage: Stage, section: OptimizerSection) -> Optimizer | None:
    named = [(name, p) for name, p in stage.canonical_parameters() if p.requires_grad]
    if not named:
        return None
    muon = None
    if section.owns_exchange:  # it steps only among replicas; its momenta are those of Adam
        unlike: dict[str, Any] = {"freeze_step": None, "options": {}, "full_precision": [], "min_dimensions": 0}
        section = section.model_copy(update={"name": "adamw", **unlike})
    elif section.name == "muon":
        muon = {id(p) for name, p in named if p.dim() == 2}
    built = section.create(parameter_groups(named, [], weight_decay=section.weight_decay, muon=muon))
    for group in built.param_groups:
        group["lr"] = 0.0  # what is measured is the same, and the weights stay those of a run's beginning
    return built


def update(stage: nn.Module, optimizer: Optimizer | None, clipping: float | None) -> None:
    """What follows on the passes of a step: the look at the gradients, the optimizer, and clearing.

    Args:
        stage: The layers here.
        optimizer: None where nothing is trained.
        clipping: The largest norm; the gradients' is taken to be twice that. None does not clip.
    """
    if clipping is None:
        largest(stage.parameters())
    else:
        squares(stage.parameters())
        clip_(stage.parameters(), norm=2 * clipping, max_norm=clipping)
    if optimizer is not None:
        optimizer.step()
    for parameter in stage.parameters():
        parameter.grad = None


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _state_ratio(stage: Stage, optimizer: Optimizer | None) -> float:
    if optimizer is None:
        return 0.0
    state = sum(
        value.nbytes
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor) and value.dim()
    )
    return state / sum(p.nbytes for _, p in stage.canonical_parameters() if p.requires_grad)


def _means(actions: Iterable[Action], recorded: Sequence[tuple[float, float]]) -> dict[str, float]:
    """By op, the mean duration of a step's actions."""
    spans: dict[str, list[float]] = {}
    for action, (start, end) in zip(actions, recorded, strict=True):
        spans.setdefault(action.op, []).append(end - start)
    return {op: statistics.mean(durations) for op, durations in spans.items()}


def gathered(value: Any, groups: PipeGroups, watcher: Watcher) -> list[Any]:
    """Every rank's JSON value, in rank order."""
    if groups.control is None:
        return [value]
    with watcher.waiting("gathering the profile"):
        return gather_json(value, group=groups.control)
