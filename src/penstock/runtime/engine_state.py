"""An engine's state in a checkpoint: by canonical layer what belongs to the model, by rank what belongs to a rank."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from penstock._core.protocols import OwnsExchange, TakesDebts
from penstock._core.sharded import is_sharded
from penstock._version import __version__
from penstock.data_pipeline.data_sampling import Consumed
from penstock.pipe.topology import ProcessTopology
from penstock.runtime import local_replicas
from penstock.runtime.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    copy_into,
    latest_complete,
    prune,
)
from penstock.runtime.gather import gather_json
from penstock.runtime.ledger import chain, merge
from penstock.runtime.optimizers import load_groups, load_state, save_groups, save_state
from penstock.runtime.parts import Parts, Progress
from penstock.runtime.sharding.tensors import full_tensor
from penstock.runtime.tied_check import check_copies

_log = logging.getLogger(__name__)

_EXCHANGE: Final = "exchange"
_OPTIMIZER: Final = "optimizer"
_PROGRESS: Final = ("step", "samples", "tokens", "layer_tokens", "earlier")
_LOCAL: Final = local_replicas.KIND
_GROUPS: Final = "parameter_groups"


def save(parts: Parts, progress: Progress, directory: Path, *, keep: int | None) -> Path:
    """Write a checkpoint; see :meth:`penstock.runtime.engine.Engine.save_checkpoint`."""
    writer = CheckpointWriter(directory, progress.step)
    with local_replicas.common_weights(parts):
        _check_tied(parts)
        _write_layers(parts, writer)
    tensors, plain = _rank_state(parts)
    if tensors:
        writer.write_rank(parts.process.rank, tensors)
    mine = {
        "files": writer.written,
        "plain": plain,
        "ledger": parts.rates.ledger.state_dict(),
        "read": progress.read.state_dict(),
    }
    with parts.watcher.waiting("writing a checkpoint"):
        everyone = gather_json(mine, group=parts.groups.control, meter=parts.meter)
        progress.account(rank["read"] for rank in everyone)
        if parts.process.rank == 0:
            state = {
                "penstock_version": __version__,
                "progress": {name: getattr(progress, name) for name in _PROGRESS},
                "consumed": progress.accounts,
                "loss_scaler": None if parts.scaler is None else parts.scaler.state_dict(),
                "layout": layout(parts),
                "config": parts.config.to_dict(),
                "order": None if parts.order is None else parts.order.order_state(),
                "ranks": [{"plain": rank["plain"], "ledger": rank["ledger"]} for rank in everyone],
            }
            writer.seal(state, [name for rank in everyone for name in rank["files"]])
            if keep is not None:
                prune(directory, keep)
        gather_json("sealed", group=parts.groups.control, meter=parts.meter)
    return writer.path


def _write_layers(parts: Parts, writer: CheckpointWriter) -> None:
    """Write this stage's layers, by one of the ranks that hold it; where they lie in parts, all bring theirs."""
    groups, sharded = parts.groups, parts.config.data_parallel.sharded
    if groups.replica and not sharded:
        return
    first = groups.replica == 0 and groups.model_rank == 0
    for layer, tensors in _layers(parts).items():
        with parts.watcher.waiting(f"gathering layer {layer}", stage=parts.stage.index):
            whole = {name: full_tensor(t, groups=groups, meter=parts.meter) for name, t in tensors.items()}
        if first:
            writer.write_layer(layer, whole)


def load(parts: Parts, progress: Progress, directory: Path) -> Path:
    """Load a checkpoint; see :meth:`penstock.runtime.engine.Engine.load_checkpoint`."""
    checkpoint = find(directory)
    state = checkpoint.read_state()
    _load_layers(parts, checkpoint)
    progress.earlier = state["progress"]["earlier"]
    if state["layout"] == layout(parts):
        _load_rank_state(parts, checkpoint, state)
    else:
        spent = merge(rank["ledger"] for rank in state["ranks"])
        progress.earlier = spent if progress.earlier is None else chain(progress.earlier, spent)
        owed = _load_debts(parts, checkpoint, state)
        step = state["ranks"][0]["plain"].get(f"{_EXCHANGE}.step")
        if not owed and step is not None and "step" in parts.exchange.state_dict():
            parts.exchange.load_state_dict({"step": step})  # how much of the warm-up is done
        if parts.process.rank == 0 and checkpoint.ranks and not owed:
            _log.warning(
                "%s was written on another layout: the error memories of its %d ranks start from zero here",
                checkpoint.path,
                len(checkpoint.ranks),
            )
    if parts.scaler is not None and state.get("loss_scaler") is not None:
        parts.scaler.load_state_dict(state["loss_scaler"])
    progress.step = int(state["progress"]["step"])
    progress.samples = int(state["progress"]["samples"])
    if parts.order is not None and state["order"] is not None:
        parts.order.load_order_state(state["order"], consumed=progress.samples)
    progress.tokens = int(state["progress"]["tokens"])
    progress.layer_tokens = int(state["progress"]["layer_tokens"])
    progress.accounts = list(state["consumed"])
    progress.read, progress.read_before = Consumed(), Consumed.from_state(progress.accounts[-1])
    return checkpoint.path


def find(directory: Path) -> Checkpoint:
    """The checkpoint at a path: itself, or the newest complete one inside.

    Raises:
        ValueError: There is none.
    """
    if (directory / "manifest.json").is_file():
        return Checkpoint(directory)
    passed_over: list[str] = []
    checkpoint = latest_complete(directory, passed_over.append)
    if checkpoint is None:
        seen = "; ".join(passed_over) or "it holds no checkpoints"
        raise ValueError(f"{directory}: no complete checkpoint to load ({seen})")
    return checkpoint


def layout(parts: Parts) -> dict[str, Any]:
    """What must be equal for the state that belongs to ranks to be loaded again."""
    bounds = None if parts.module is None else parts.module.bounds
    return {
        "axes": parts.groups.topology.get_axis_names(),
        "stages": parts.groups.num_pipe_ranks,
        "replicas": parts.groups.num_replicas,
        "bounds": None if bounds is None else list(bounds),
        **({"sharding": parts.config.data_parallel.sharding} if parts.config.data_parallel.sharded else {}),
        **({"model": parts.groups.num_model_ranks} if parts.groups.model is not None else {}),
    }


def load_weights(parts: Parts, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights and buffers into the stage, and nothing else."""
    layers: dict[int, list[tuple[str, str, Tensor]]] = defaultdict(list)
    for named in _named_tensors(parts):
        layers[_layer_of(named[1])].append(named)
    for layer, wanted in layers.items():
        tensors = checkpoint.read_layer(layer)  # each file once: reading it verifies it as a whole
        for kind, name, tensor in wanted:
            key = f"{kind}:{name}"
            if key not in tensors:
                raise ValueError(f"{checkpoint.path}: holds no {kind} {name!r}; it was written by another model")
            copy_into(tensor, tensors[key], f"{checkpoint.path}: {name}")


def _check_tied(parts: Parts) -> None:
    tied = parts.stage.tied
    for key, group in sorted(parts.groups.tied.items()):
        with parts.watcher.waiting(f"comparing the copies of {key}", stage=parts.stage.index):
            check_copies(tied[key], group=group, meter=parts.meter)
    if parts.groups.model is not None:
        whole = [(name, p) for name, p in parts.stage.canonical_parameters() if not is_sharded(p, "model")]
        with parts.watcher.waiting("comparing weights over the model axis", stage=parts.stage.index):
            check_copies(whole, group=parts.groups.model, meter=parts.meter)


def _named_tensors(parts: Parts) -> list[tuple[str, str, Tensor]]:
    """Weights and persistent buffers of the stage as ``(kind, canonical name, tensor)``."""
    found = [("weight", name, p.detach()) for name, p in parts.stage.canonical_parameters()]
    for index, module in parts.stage.canonical_modules():
        # Parameters are told by type: wrappers such as random-LTD's change their names in a state dict.
        found += [
            ("buffer", f"layer_{index:03d}.{name}", tensor)
            for name, tensor in module.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
        ]
    return found


def _layer_of(name: str) -> int:
    return int(name.removeprefix("layer_").partition(".")[0])


def _layers(parts: Parts) -> dict[int, dict[str, Tensor]]:
    """What this rank writes: its layers' tensors, without copies of weights that another stage owns."""
    local = {index for index, _ in parts.stage.canonical_modules()}
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for kind, name, tensor in _named_tensors(parts):
        layers[_layer_of(name)][f"{kind}:{name}"] = tensor
    for name, entries in save_state(parts.optimizer, parts.shared.names).items():
        for key, value in entries.items():
            layers[_layer_of(name)][f"{_OPTIMIZER}.{key}:{name}"] = value
    for name, entries in local_replicas.common_tensors(parts).items():
        for key, value in entries.items():
            layers[_layer_of(name)][f"{local_replicas.KIND}.{key}:{name}"] = value
    return {layer: tensors for layer, tensors in layers.items() if layer in local}


def _load_layers(parts: Parts, checkpoint: Checkpoint) -> None:
    load_weights(parts, checkpoint)
    saved: dict[str, dict[str, dict[str, Tensor]]] = {owner: defaultdict(dict) for owner in (_OPTIMIZER, _LOCAL)}
    for layer in sorted({_layer_of(name) for name in parts.shared.names.values()}):
        for full, tensor in checkpoint.read_layer(layer).items():
            kind, _, name = full.partition(":")
            owner, _, key = kind.partition(".")
            if owner in saved:
                saved[owner][name][key] = tensor
    load_state(parts.optimizer, parts.shared.names, saved[_OPTIMIZER])
    local_replicas.load_common(parts, saved[_LOCAL])


def _rank_state(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The exchange's and the optimizer's state that belongs to this rank: tensors, and plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for owner, state in (
        (_EXCHANGE, parts.exchange.state_dict()),
        (_OPTIMIZER, _error_state(parts)),
        (_LOCAL, local_replicas.rank_state(parts)),
    ):
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}.{name}"] = value
            else:
                plain[f"{owner}.{name}"] = value
    plain[_GROUPS] = save_groups(parts.optimizer)
    return tensors, plain


def _load_rank_state(parts: Parts, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    rank = parts.process.rank
    mine = state["ranks"][rank]
    parts.rates.ledger.load_state_dict(mine["ledger"])
    if parts.schedule is None:  # rates are the user's own affair, who may have changed them since the start
        load_groups(parts.optimizer, mine["plain"][_GROUPS])
    by_owner = _owned(checkpoint, state, rank)
    parts.exchange.load_state_dict(by_owner[_EXCHANGE])
    if isinstance(parts.optimizer, OwnsExchange):
        parts.optimizer.load_error_state(by_owner[_OPTIMIZER])
    local_replicas.load_rank_state(parts, by_owner[_LOCAL])


def _load_debts(parts: Parts, checkpoint: Checkpoint, state: Mapping[str, Any]) -> bool:
    """Take over what another number of replicas of the same stages owed; says whether anybody takes it."""
    then, now = dict(state["layout"]), layout(parts)
    dims = {"pipe": then["stages"], "data": then["replicas"], "model": then.get("model", 1)}
    if {**then, "replicas": None} != {**now, "replicas": None}:
        return False
    topology = ProcessTopology(then["axes"], [dims.get(axis, 1) for axis in then["axes"]])
    place = {"pipe": parts.groups.pipe_rank, "model": parts.groups.model_rank}
    ranks = topology.filter_match(**{axis: at for axis, at in place.items() if axis in then["axes"]})
    states = [_owned(checkpoint, state, rank) for rank in ranks]
    if isinstance(parts.optimizer, OwnsExchange):
        parts.optimizer.load_error_states([owned[_OPTIMIZER] for owned in states])
        return True
    if isinstance(parts.exchange, TakesDebts) and all("step" in owned[_EXCHANGE] for owned in states):
        return parts.exchange.load_debts([owned[_EXCHANGE] for owned in states])
    local_replicas.load_rank_states(parts, [owned[_LOCAL] for owned in states])
    return parts.local_updates is not None


def _owned(checkpoint: Checkpoint, state: Mapping[str, Any], rank: int) -> dict[str, dict[str, Any]]:
    """What a checkpoint holds for a rank, by owner."""
    everything = {name: value for name, value in state["ranks"][rank]["plain"].items() if name != _GROUPS}
    if rank in checkpoint.ranks:
        everything.update(checkpoint.read_rank(rank))
    by_owner: dict[str, dict[str, Any]] = {_EXCHANGE: {}, _OPTIMIZER: {}, _LOCAL: {}}
    for name, value in everything.items():
        owner, _, key = name.partition(".")
        by_owner[owner][key] = value
    return by_owner


def _error_state(parts: Parts) -> dict[str, Any]:
    return dict(parts.optimizer.error_state()) if isinstance(parts.optimizer, OwnsExchange) else {}
