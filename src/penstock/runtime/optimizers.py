"""Builds the optimizer of one stage, and moves its state in and out of checkpoints by canonical names."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock.runtime.checkpoint import copy_into
from penstock.runtime.config_sections import OptimizerSection

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
NamedParameters = list[tuple[str, nn.Parameter]]


def parameter_groups(
    own: NamedParameters, shared: NamedParameters, *, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer.

    Each weight shared with other stages forms a group of its own, since an optimizer that compresses by bucket must
    not mix it with neighbours: a scale shared with a neighbour that another stage lacks would make the copies drift
    apart. Parameters of fewer than two dimensions (norms, biases) are not decayed.

    Args:
        own: Parameters of this stage alone, with canonical names.
        shared: Copies of parameters that other stages hold too, in the same order on all of them.
        weight_decay: Decay of the matrices; None leaves decay to the optimizer and does not split by dimension.

    Returns:
        Dicts with ``params`` and, if asked for, ``weight_decay``; empty groups are left out.
    """
    groups: list[dict[str, Any]] = []
    for named in (own, *([pair] for pair in shared)):
        parameters = [parameter for _, parameter in named if parameter.requires_grad]
        if weight_decay is None:
            groups.append({"params": parameters})
            continue
        matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
        vectors = [parameter for parameter in parameters if parameter.dim() < 2]
        groups.append({"params": matrices, "weight_decay": weight_decay})
        groups.append({"params": vectors, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def optimizer_factory(section: OptimizerSection) -> OptimizerFactory:
    """The optimizer that a configuration names, as a factory over parameter groups."""
    if section.name == "adamw":

        def adamw(groups: list[dict[str, Any]]) -> Optimizer:
            return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps)

        return adamw

    from penstock.compression import OneBitAdam

    assert section.name == "onebit_adam"  # names are checked when the configuration is loaded
    assert section.freeze_step is not None
    freeze_step = section.freeze_step

    def onebit_adam(groups: list[dict[str, Any]]) -> Optimizer:
        return OneBitAdam(groups, lr=section.lr, betas=section.betas, eps=section.eps, freeze_step=freeze_step)

    return onebit_adam


def check_parameters(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Check that an optimizer steps exactly the parameters of this stage.

    Raises:
        ValueError: It misses some, or holds others.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {id(p) for p in parameters if p.requires_grad}
    if held != wanted:
        raise ValueError(
            f"the optimizer holds {len(held)} parameters, of which {len(held & wanted)} are among the {len(wanted)} "
            "trainable ones of this stage; build it over the parameters that the factory is given, or over all of "
            "model.parameters()"
        )


def save_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by canonical parameter name: ``{name: {"exp_avg": tensor, ...}}``.

    Numbers become 0-dimensional float64 tensors, so that one safetensors file holds everything.

    Args:
        optimizer: Any optimizer whose state values are tensors and numbers.
        names: From ``id(parameter)`` to its canonical name.
    """
    packed = optimizer.state_dict()
    result: dict[str, dict[str, Tensor]] = {}
    for number, parameter in enumerate(_in_order(optimizer)):
        state = packed["state"].get(number, {})
        entries = {key: _as_tensor(value, key) for key, value in state.items() if value is not None}
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
            if value.dim() and value.shape != parameter.shape:
                name = names[id(parameter)]
                copy_into(parameter.detach(), value, f"{key} of {name}")  # raises with both shapes
        # Clones lie in aligned memory of their own; tensors read from a file lie where the file put them.
        state[number] = {key: value.clone() for key, value in entries.items()}
    optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def _in_order(optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters in the order in which ``Optimizer.state_dict`` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _as_tensor(value: Any, key: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, int | float):
        return torch.tensor(float(value), dtype=torch.float64)
    raise ValueError(
        f"the optimizer keeps {key!r} as a {type(value).__name__}, which a checkpoint cannot hold; "
        "tensors and numbers can be saved"
    )
