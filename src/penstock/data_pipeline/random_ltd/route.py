"""One route across several layers: tokens are dropped before the first and return after the last.

(Krause et al., "TREAD: Token Routing for Efficient Architecture-agnostic Diffusion Training", arXiv:2501.04765.)

Between its ends only the kept tokens exist, so what the others were must travel beside them. Where layers pass a dict
on it travels in the dict, from stage to stage of a pipeline too; where they pass a tensor, as an attribute of that very
tensor. Both stay with the values of one micro-batch, whatever else is in flight, and are there again when activation
checkpointing calls a layer a second time.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor

RoutePart = Literal["begin", "inside", "end"]
"""A layer's place in a route of two layers or more."""

ENTRY: Final = "random_ltd_route"
_ATTRIBUTE: Final = "_random_ltd_route"


@dataclass(frozen=True, slots=True)
class Route:
    """What travels beside the kept tokens.

    Attributes:
        passed: All tokens as they were before the route, ``[B, S, D]`` or ``[S, B, D]``; None if none was dropped.
        indices: The kept ones, int32 ``[B, K]``; None if none was dropped.
    """

    passed: Tensor | None = None
    indices: Tensor | None = None


def route_of(value: Any, hidden: Tensor) -> Route | None:
    """The route that the hidden states are on, or None.

    Args:
        value: The layer's first argument.
        hidden: The hidden states in it.
    """
    if isinstance(value, dict):
        entry = value.get(ENTRY)
        return None if entry is None else Route(**entry)
    route: Route | None = getattr(hidden, _ATTRIBUTE, None)
    return route


def send(output: Any, route: Route | None) -> Any:
    """The layer's output with the route beside the hidden states; None takes it away.

    Args:
        output: A tensor, a tuple or list that begins with one, or a dict.
        route: What travels on.
    """
    if isinstance(output, dict):
        rest = {name: item for name, item in output.items() if name != ENTRY}
        return rest if route is None else {**rest, ENTRY: {"passed": route.passed, "indices": route.indices}}
    hidden = output[0] if isinstance(output, tuple | list) else output
    if route is not None:
        setattr(hidden, _ATTRIBUTE, route)
    return output
