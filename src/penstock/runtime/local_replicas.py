"""A run whose replicas train apart: making its local updates, and its state in checkpoints.

The layers' files of a checkpoint hold what all replicas agree on (the weights of the last exchange, the outer momentum)
and the optimizer's state of the first replica. Each rank's own file has what makes it go on bit for bit: its own
weights and optimizer state, and what it owes.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock._core.meter import Meter
from penstock._core.protocols import HasCommonWeights
from penstock._core.waiting import Watcher
from penstock.compression import LocalUpdates
from penstock.pipe.groups import PipeGroups
from penstock.runtime.config import TrainConfig
from penstock.runtime.optimizers import load_state, save_state
from penstock.runtime.parts import Parts
from penstock.runtime.shared_parameters import SharedParameters

KIND: Final = "local_updates"
"""Begins the names of the tensors in a layer's file."""
_WEIGHT: Final = "weight:"
_OPTIMIZER: Final = "optimizer."


def make_local_updates(
    config: TrainConfig,
    optimizer: Optimizer,
    shared: SharedParameters,
    groups: PipeGroups,
    *,
    meter: Meter,
    watcher: Watcher,
) -> LocalUpdates | None:
    """The local updates that a configuration asks for, attached to the optimizer; None if it does not."""
    section = config.local_updates
    if section is None:
        return None
    return section.method_class(
        optimizer,
        section.period,
        **section.given,
        error_feedback=section.error_feedback,
        fragments=_fragments(shared, optimizer, section.number_of_fragments),
        group=groups.replicas,
        replicas=groups.num_replicas,
        bucket_bytes=int(section.bucket_mb * 2**20),
        meter=meter,
        watcher=watcher,
    ).attach()


def common_weights(parts: Parts) -> AbstractContextManager[None]:
    """Within it the parameters are those on which all replicas agree; where they never differ, nothing changes."""
    for owner in (parts.local_updates, parts.optimizer):
        if isinstance(owner, HasCommonWeights):
            return owner.common_weights()
    return nullcontext()


def common_tensors(parts: Parts) -> dict[str, dict[str, Tensor]]:
    """For each parameter's canonical name, what belongs to the layers' files beside the common weights."""
    if parts.local_updates is None:
        return {}
    return {
        parts.shared.names[id(parameter)]: {
            key: value
            for key, value in state.items()
            if key != "anchor" or value.dtype != parameter.dtype  # else it is the weight that is saved
        }
        for parameter, state in parts.local_updates.common_state().items()
    }


@torch.no_grad()
def load_common(parts: Parts, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Restore :func:`common_tensors` after the common weights were loaded; what was not saved begins anew."""
    if parts.local_updates is None:
        return
    for parameter, state in parts.local_updates.common_state().items():
        theirs = saved.get(parts.shared.names[id(parameter)], {})
        for key, mine in state.items():
            if key in theirs:
                mine.copy_(theirs[key])
            elif key == "anchor":
                mine.copy_(parameter.detach())
            else:
                mine.zero_()
    parts.local_updates.anchors_are_known()


def rank_state(parts: Parts) -> dict[str, Any]:
    """What belongs to this rank alone: its weights, its optimizer's state, steps, memories, arrivals."""
    if parts.local_updates is None:
        return {}
    state = parts.local_updates.rank_state()
    for name, parameter in _named(parts):
        state[_WEIGHT + name] = parameter.detach()
    if parts.groups.replica:  # the first replica's is in the layers' files
        for name, entries in save_state(parts.optimizer, parts.shared.names).items():
            for key, value in entries.items():
                state[f"{_OPTIMIZER}{key}:{name}"] = value
    return state


@torch.no_grad()
def load_rank_state(parts: Parts, state: Mapping[str, Any]) -> None:
    """Restore :func:`rank_state` on the same layout, after everything else; a run without it begins a period."""
    if parts.local_updates is None or "step" not in state:
        return
    parts.local_updates.load_rank_state(state)
    for name, parameter in _named(parts):
        parameter.copy_(state[_WEIGHT + name])
    saved: dict[str, dict[str, Tensor]] = {}
    for full, value in state.items():
        if full.startswith(_OPTIMIZER):
            key, _, name = full.removeprefix(_OPTIMIZER).partition(":")
            saved.setdefault(name, {})[key] = value
    if saved:
        load_state(parts.optimizer, parts.shared.names, saved)


def load_rank_states(parts: Parts, states: Sequence[Mapping[str, Any]]) -> None:
    """Take over what another number of replicas owed; the period begins with the common weights."""
    if parts.local_updates is not None and states and all("step" in state for state in states):
        parts.local_updates.load_rank_states(states)


def _named(parts: Parts) -> list[tuple[str, nn.Parameter]]:
    return [*parts.shared.own, *parts.shared.shared]


def _fragments(shared: SharedParameters, optimizer: Optimizer, count: int) -> int | list[list[nn.Parameter]]:
    """The fragments of a stage: layers take turns, and weights that other stages hold too are in the first.

    A model that is one layer is cut by the number of elements.
    """
    layer_of = {id(p): int(name.removeprefix("layer_").partition(".")[0]) for name, p in shared.own}
    if count == 1 or (not shared.shared and len(set(layer_of.values())) <= 1):
        return count
    fragments: list[list[nn.Parameter]] = [[] for _ in range(count)]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            fragments[layer_of.get(id(parameter), 0) % count].append(parameter)
    return fragments
