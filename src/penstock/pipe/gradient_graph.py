"""Which parts of an autograd graph a split backward pass runs first, and which can wait.

Seen from the outputs of a stage, a node of the graph lies on the *input side* when a path from it leads to an input of
the stage; any other node that leads to a parameter lies on the *weight side*. An edge from the one to the other is an
*exit*, and the node that it leaves is the exit's *owner*::

    output --> Addmm1 --> Tanh --> Addmm0 --> input         input side
                 |                   |
                 v                   v
                 T1 --> weight1      T0 --> weight0         weight side

Autograd computes of a node only what the requested inputs need. So the input gradients come from a pass to the inputs
that also captures what arrives at each owner; a weight's gradient is that captured gradient taken from the owner to the
weight later on. This is exact as long as no other path leads from the owner to the weight:

- *direct*: a weight with a single owner. Nothing else can lead to it.
- *joint*: a weight that several owners use, each through an exit of its own (``w.t()`` twice). From each owner to its
  exits first, then from all exits together, so that autograd adds up.
- *whole*: anything else. The gradient is computed with the input gradients. So it is where the owner is *opaque*: a
  Python autograd function, compiled blocks among them, computes all its gradients at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, get_gradient_edge

Node = Any
"""An autograd node: of C++ or of a Python function, which share no class."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A node whose weight products can wait.

    Attributes:
        arrivals: The edges at which gradients arrive there.
        exits: Its exits.
        parameters: The leaves that these lead to.
    """

    arrivals: tuple[GradientEdge, ...]
    exits: tuple[GradientEdge, ...]
    parameters: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Division:
    """A graph divided for a split backward pass.

    Attributes:
        direct: Owners whose weights nobody else uses, those nearest the outputs first.
        joint: Owners that share weights.
        whole: The parameters (as edges) whose gradient is computed with the input gradients.
        reasons: Why ``whole`` is not empty; each reason once.
    """

    direct: tuple[Owner, ...]
    joint: tuple[Owner, ...]
    whole: tuple[GradientEdge, ...]
    reasons: tuple[str, ...]


def divide(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> Division:
    """Divide the graph between a stage's outputs and its inputs.

    Args:
        outputs: Tensors with gradients.
        leaves: The stage's inputs that require one.
    """
    return _Graph(outputs, leaves).divided()


def parameters_under(roots: Iterable[Node]) -> list[Tensor]:
    """The leaves that some nodes lead to."""
    return [node.variable for node in _children_first(roots, ()) if hasattr(node, "variable")]


@dataclass(frozen=True, slots=True)
class _Exit:
    owner: Node
    target: Node
    edge: GradientEdge
    parameters: frozenset[Node]


@dataclass(slots=True)
class _Graph:
    outputs: Sequence[Tensor]
    leaves: Sequence[Tensor]
    input_side: set[Node] = field(default_factory=set)
    parameters: dict[Node, frozenset[Node]] = field(default_factory=dict)
    arrivals: dict[Node, dict[int, None]] = field(default_factory=dict)
    exits: list[_Exit] = field(default_factory=list)

    def divided(self) -> Division:
        self._walk()
        reasons: dict[str, None] = {}
        whole = self._opaque(reasons)
        users: dict[Node, set[Node]] = {}
        for leaving in self.exits:
            for parameter in leaving.parameters:
                users.setdefault(parameter, set()).add(leaving.owner)
        joint = self._settle(whole, users, reasons)
        owners: dict[Node, list[_Exit]] = {}
        for leaving in self.exits:
            if leaving.parameters.isdisjoint(whole):
                owners.setdefault(leaving.owner, []).append(leaving)
        made = {node: self._owner(node, exits) for node, exits in owners.items()}
        return Division(
            direct=tuple(owner for node, owner in made.items() if node not in joint),
            joint=tuple(owner for node, owner in made.items() if node in joint),
            whole=tuple(GradientEdge(node, 0) for node in whole),
            reasons=tuple(reasons),
        )

    def _walk(self) -> None:
        roots = [get_gradient_edge(output) for output in self.outputs]
        for root in roots:
            self.arrivals.setdefault(root.node, {})[root.output_nr] = None
        self.input_side.update(get_gradient_edge(leaf).node for leaf in self.leaves)
        order = _children_first([root.node for root in roots], self.input_side)
        for node in order:
            followers = [child for child, _ in node.next_functions if child is not None]
            if not self.input_side.isdisjoint(followers):
                self.input_side.add(node)
            elif hasattr(node, "variable"):
                self.parameters[node] = frozenset((node,))
            elif len(followers) == 1:
                self.parameters[node] = self.parameters[followers[0]]
            else:
                self.parameters[node] = frozenset().union(*(self.parameters[child] for child in followers))
        for root in dict.fromkeys(roots):
            # An output that depends on weights alone is an exit by itself.
            if root.node not in self.input_side and self.parameters[root.node]:
                self.exits.append(_Exit(root, root.node, root, self.parameters[root.node]))
        for node in reversed(order):
            if node not in self.input_side:
                continue
            for child, number in node.next_functions:
                if child in self.input_side:
                    self.arrivals.setdefault(child, {})[number] = None
                elif child is not None and self.parameters[child]:
                    self.exits.append(_Exit(node, child, GradientEdge(child, number), self.parameters[child]))

    def _opaque(self, reasons: dict[str, None]) -> dict[Node, None]:
        whole: dict[Node, None] = {}
        for leaving in self.exits:
            name = type(leaving.owner).__name__
            if isinstance(leaving.owner, FunctionCtx) or name == "CopySlices" or "CppNode" in name:
                reasons[f"{name} computes all its gradients at once"] = None
                whole.update(dict.fromkeys(leaving.parameters))
        return whole

    def _settle(self, whole: dict[Node, None], users: dict[Node, set[Node]], reasons: dict[str, None]) -> set[Node]:
        """Add to ``whole`` what cannot be told apart; returns the owners of the joint exits."""
        while True:
            before = len(whole)
            for leaving in self.exits:
                if not leaving.parameters.isdisjoint(whole):
                    whole.update(dict.fromkeys(leaving.parameters))
            waiting = [leaving for leaving in self.exits if leaving.parameters.isdisjoint(whole)]
            joint = {x.owner for x in waiting if any(len(users[parameter]) > 1 for parameter in x.parameters)}
            for leaving in _entangled([x for x in waiting if x.owner in joint]):
                reasons[f"{type(leaving.owner).__name__} shares a weight with another use of it"] = None
                whole.update(dict.fromkeys(leaving.parameters))
            if len(whole) == before:
                return joint

    def _owner(self, node: Node, exits: list[_Exit]) -> Owner:
        parameters = dict.fromkeys(parameter for leaving in exits for parameter in leaving.parameters)
        arrivals = [node] if isinstance(node, GradientEdge) else [GradientEdge(node, n) for n in self.arrivals[node]]
        return Owner(
            arrivals=tuple(arrivals),
            exits=tuple(dict.fromkeys(leaving.edge for leaving in exits)),
            parameters=tuple(parameter.variable for parameter in parameters),
        )


def _entangled(exits: list[_Exit]) -> list[_Exit]:
    """Exits whose target another owner uses too, or another exit leads to."""
    if not exits:
        return []
    owners: dict[Node, set[Node]] = {}
    for leaving in exits:
        owners.setdefault(leaving.target, set()).add(leaving.owner)
    reached: set[Node] = set()
    for target in owners:
        below = _children_first([child for child, _ in target.next_functions if child is not None], ())
        reached.update(below)
    return [leaving for leaving in exits if len(owners[leaving.target]) > 1 or leaving.target in reached]


def _children_first(roots: Iterable[Node], ends: Iterable[Node]) -> list[Node]:
    """All nodes under ``roots`` but ``ends`` and what these lead to, each after those that it leads to."""
    seen = set(ends)
    order: list[Node] = []
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(root.next_functions))]
        while stack:
            node, children = stack[-1]
            for child, _ in children:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append((child, iter(child.next_functions)))
                    break
            else:
                stack.pop()
                order.append(node)
    return order
