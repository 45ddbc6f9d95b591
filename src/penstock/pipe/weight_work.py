"""The half of a backward pass that nobody waits for."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from penstock.pipe.gradient_graph import Division, Owner, parameters_under

T = TypeVar("T")


class _Waiting(NamedTuple):
    """An owner, and the gradients that arrived at it."""

    owner: Owner
    edges: list[GradientEdge]
    gradients: list[Tensor]


class WeightWork:
    """The weight gradients of one micro-batch on one stage, still to be computed.

    It keeps what they need of the graph alive until :meth:`run`.
    """

    def __init__(self) -> None:
        self._direct: list[_Waiting] = []
        self._joint: list[_Waiting] = []
        self._passes: list[tuple[list[Tensor], list[Tensor]]] = []

    def add_pass(self, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        """Leave a whole backward pass for later: no input of these outputs needs a gradient."""
        self._passes.append((outputs, gradients))

    def add_owners(self, division: Division, arrived: Sequence[Tensor | None]) -> None:
        """Note what arrived at the owners of a division, one gradient for each of their arrivals in order."""
        rest = iter(arrived)
        for owners, store in ((division.direct, self._direct), (division.joint, self._joint)):
            for owner in owners:
                edges, gradients = with_gradients(owner.arrivals, [next(rest) for _ in owner.arrivals])
                if edges:
                    store.append(_Waiting(owner, edges, gradients))

    def run(self, before_last: Callable[[list[Tensor]], None] | None = None) -> None:
        """Add the weight gradients to ``.grad``, and let go of the graph.

        Args:
            before_last: Called before each part of the work with the parameters that no later part adds to. It takes a
                walk through the graph to know them.
        """
        direct, joint, passes = self._direct, self._joint, self._passes
        self._direct, self._joint, self._passes = [], [], []
        final: dict[int, list[Tensor]] = {}
        if before_last is not None:
            final = _last_part_of(direct, joint, passes)
        for part in range(len(direct) + bool(joint) + len(passes)):
            if before_last is not None and part in final:
                before_last(final[part])
            if part < len(direct):
                owner, edges, gradients = direct[part]
                torch.autograd.backward(edges, gradients, inputs=list(owner.parameters))
            elif joint and part == len(direct):
                _run_joint(joint)
            else:
                torch.autograd.backward(*passes[part - len(direct) - bool(joint)])


def with_gradients(places: Sequence[T], gradients: Sequence[Tensor | None]) -> tuple[list[T], list[Tensor]]:
    """Of places (tensors, or edges of a graph) and their gradients, those that have one."""
    pairs = [pair for pair in zip(places, gradients, strict=True) if pair[1] is not None]
    return [place for place, _ in pairs], [gradient for _, gradient in pairs if gradient is not None]


def _last_part_of(
    direct: list[_Waiting], joint: list[_Waiting], passes: list[tuple[list[Tensor], list[Tensor]]]
) -> dict[int, list[Tensor]]:
    """For each part, the parameters that it is the last to add to."""
    parts: list[Any] = [waiting.owner.parameters for waiting in direct]
    if joint:
        parts.append([parameter for waiting in joint for parameter in waiting.owner.parameters])
    parts += [parameters_under([get_gradient_edge(output).node for output in outputs]) for outputs, _ in passes]
    last = {parameter: part for part, parameters in enumerate(parts) for parameter in parameters}
    found: dict[int, list[Tensor]] = {}
    for parameter, part in last.items():
        found.setdefault(part, []).append(parameter)
    return found


def _run_joint(joint: list[_Waiting]) -> None:
    """From each owner to its exits, then from all exits to the weights."""
    edges: list[GradientEdge] = []
    gradients: list[Tensor] = []
    for owner, arrivals, arrived in joint:
        found = torch.autograd.grad(arrivals, owner.exits, arrived, retain_graph=True, allow_unused=True)
        reached, gained = with_gradients(owner.exits, found)
        edges += reached
        gradients += gained
    parameters = dict.fromkeys(parameter for waiting in joint for parameter in waiting.owner.parameters)
    if edges:
        torch.autograd.backward(edges, gradients, inputs=list(parameters))
