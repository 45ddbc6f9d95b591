"""Builds the optimizer of one stage, and moves its state in and out of checkpoints by canonical names."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock.pipe.local_stages import AnyStages
from penstock.runtime.checkpoint import copy_into
from penstock.runtime.sharding.tensors import divided_like

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
NamedParameters = list[tuple[str, nn.Parameter]]

_NUMBER: Final = "number."


def parameter_groups(
    own: NamedParameters,
    shared: NamedParameters,
    *,
    weight_decay: float | None = None,
    muon: Collection[int] | None = None,
    named: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer.

    Each weight shared with other stages forms a group of its own, since an optimizer that compresses by bucket must
    not mix it with neighbours: a scale shared with a neighbour that another stage lacks would make the copies drift
    apart. Parameters of fewer than two dimensions (norms, biases) are not decayed.

    Args:
        own: Parameters of this stage alone, with canonical names.
        shared: Copies of parameters that other stages hold too, in the same order on all of them.
        weight_decay: Decay of the matrices; None leaves decay to the optimizer and does not split by dimension.
        muon: ``id()`` of the parameters that Muon is to step; None for an optimizer that treats all alike.
        named: Give torch the names, too.

    Returns:
        Dicts with ``params`` (named ones as pairs) and, if asked for, ``weight_decay`` and ``muon``; empty groups are
        left out.
    """
    groups: list[dict[str, Any]] = []
    for pairs in (own, *([pair] for pair in shared)):
        trained = [pair for pair in pairs if pair[1].requires_grad]
        if weight_decay is None:
            groups.append({"params": trained})
            continue
        matrices = [pair for pair in trained if pair[1].dim() >= 2]
        vectors = [pair for pair in trained if pair[1].dim() < 2]
        if muon is None:
            groups.append({"params": matrices, "weight_decay": weight_decay})
        else:
            for mark in (True, False):
                marked = [pair for pair in matrices if (id(pair[1]) in muon) is mark]
                groups.append({"params": marked, "weight_decay": weight_decay, "muon": mark})
        groups.append({"params": vectors, "weight_decay": 0.0, **({} if muon is None else {"muon": False})})
    if not named:
        for group in groups:
            group["params"] = [parameter for _, parameter in group["params"]]
    return [group for group in groups if group["params"]]


def hidden_matrices(stage: AnyStages, *, last_layer: int | None) -> set[int]:
    """``id()`` of the matrices that Muon is made for: the weights of linear layers but the model's output layer.

    Args:
        stage: The layers here; tied weights count as embeddings.
        last_layer: Canonical index of the model's last layer; None where the whole model is one layer.
    """
    outer = {id(parameter) for pairs in stage.tied.values() for _, parameter in pairs}
    hidden: set[int] = set()
    for index, layer in stage.canonical_modules():
        if index == last_layer:
            continue
        head_of = getattr(layer, "get_output_embeddings", None)  # Hugging Face's
        head = head_of() if callable(head_of) else None
        for module in layer.modules():
            if isinstance(module, nn.Embedding):
                outer.add(id(module.weight))  # of which an output layer may be a copy
            elif isinstance(module, nn.Linear) and module is not head:
                hidden.add(id(module.weight))
    return hidden - outer


def check_parameters(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Check that an optimizer steps all trainable parameters of this stage, and none of anything else.

    It may hold frozen ones too: ``model.parameters()`` does.

    Raises:
        ValueError: It misses some, or holds others.
    """
    here = list(parameters)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {id(p) for p in here if p.requires_grad}
    if not wanted <= held <= {id(p) for p in here}:
        raise ValueError(
            f"the optimizer holds {len(held)} parameters, of which {len(held & wanted)} are among the {len(wanted)} "
            "trainable ones of this stage; build it over the parameters that the factory is given, or over all of "
            "model.parameters()"
        )


def save_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by canonical parameter name: ``{name: {"exp_avg": tensor, ...}}``.

    Numbers become 0-dimensional tensors under ``number.KEY``, so that one safetensors file holds everything.

    Args:
        optimizer: Any optimizer whose state values are tensors and numbers, and belong to parameters.
        names: From ``id(parameter)`` to its canonical name.

    Raises:
        ValueError: The optimizer keeps something else, or something that belongs to no parameter.
    """
    packed = optimizer.state_dict()
    others = [key for key in packed["state"] if not isinstance(key, int)]
    if others:
        raise ValueError(f"the optimizer keeps {others} apart from its parameters, which a checkpoint cannot hold")
    result: dict[str, dict[str, Tensor]] = {}
    for number, parameter in enumerate(_in_order(optimizer)):
        state = packed["state"].get(number, {})
        entries = dict(_as_tensor(key, value) for key, value in state.items() if value is not None)
        if entries:
            result[names[id(parameter)]] = entries
    return result


def load_state(optimizer: Optimizer, names: Mapping[int, str], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put back what :func:`save_state` returned, by name, whatever the order of the parameters is now."""
    packed = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(_in_order(optimizer)):
        entries = saved.get(names[id(parameter)])
        if entries is None:
            continue
        for key, value in entries.items():
            # Factored moments (Adafactor's) have their parameter's dimensions too, with sizes of 1 among them.
            sizes = zip(value.shape, parameter.shape, strict=False)
            if value.dim() == parameter.dim() and any(mine not in (1, theirs) for mine, theirs in sizes):
                name = names[id(parameter)]
                copy_into(parameter.detach(), value, f"{key} of {name}")  # raises with both shapes
        state[number] = dict(_from_tensor(key, value, parameter) for key, value in entries.items())
    optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def _in_order(optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters in the order in which ``Optimizer.state_dict`` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def save_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the parameter groups hold beside parameters (rates, counters), as JSON values.

    Entries of other kinds are left out: they are what the optimizer was made with.
    """
    return [
        {key: _scalar(value) for key, value in group.items() if key != "params" and _is_plain(_scalar(value))}
        for group in optimizer.param_groups
    ]


def load_groups(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Put back what :func:`save_groups` returned for an optimizer with as many groups.

    Raises:
        ValueError: It has another number of groups.
    """
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint's optimizer has {len(saved)} parameter groups, this one {len(optimizer.param_groups)}; "
            "build it as it was built then"
        )
    for group, entries in zip(optimizer.param_groups, saved, strict=True):
        for key, value in entries.items():
            mine = group.get(key)
            if isinstance(mine, Tensor):
                mine.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) and isinstance(mine, tuple) else value


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value))


def _as_tensor(key: str, value: Any) -> tuple[str, Tensor]:
    if isinstance(value, Tensor):
        return key, value.detach()
    if isinstance(value, int | float):
        dtype = torch.float64 if isinstance(value, float) else None
        return _NUMBER + key, torch.tensor(value, dtype=dtype)
    raise ValueError(
        f"the optimizer keeps {key!r} as a {type(value).__name__}, which a checkpoint cannot hold; "
        "tensors and numbers can be saved"
    )


def _from_tensor(key: str, value: Tensor, parameter: nn.Parameter) -> tuple[str, Any]:
    if key.startswith(_NUMBER):
        return key.removeprefix(_NUMBER), value.item()
    # A clone lies in aligned memory of its own; tensors read from a file lie where the file put them.
    return key, divided_like(value, parameter) if value.shape == parameter.shape else value.clone()
