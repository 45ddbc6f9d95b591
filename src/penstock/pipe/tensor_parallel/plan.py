"""Which parameters of a layer are divided, and how: a plan is data.

A layer that can be divided has a method ``tensor_parallel_plan(size)``, which returns a dict from the names of its
submodules (``""`` for the layer itself) to one of these:

- ``columns``: a linear layer whose output features are divided; its output stays divided.
- ``gathered_columns``: the same, but the output is made whole on every rank: an output layer.
- ``rows``: a linear layer whose input features are divided, as ``columns`` leaves them; its output is summed.
- ``vocabulary``: a module with a ``weight`` ``[V, D]`` divided by tokens and the methods ``lookup(ids)`` and
  ``logits(x)``.
- ``heads``: a module with an attribute ``heads``, the range of attention heads that it computes.

It raises a ValueError where the layer cannot be divided over so many ranks.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import nn

from penstock._core.suggest import unknown_name
from penstock.pipe.layer_spec import LayerSpec, TiedLayerSpec, layer_name

Plan = dict[str, str]

STYLES: Final = ("columns", "gathered_columns", "rows", "vocabulary", "heads")


@runtime_checkable
class Divisible(Protocol):
    """A layer that knows how it is divided."""

    def tensor_parallel_plan(self, size: int) -> Plan:
        """See the module's text."""


def plan_of(index: int, layer: nn.Module, size: int) -> Plan:
    """A layer's plan for ``size`` ranks; empty for a layer that stays whole.

    Args:
        index: Canonical index, for messages.
        layer: It may lie on the meta device.
        size: Ranks of the ``model`` axis.

    Raises:
        ValueError: The layer cannot be divided so, or its plan names something that there is not.
    """
    if not isinstance(layer, Divisible):
        return {}
    try:
        plan = layer.tensor_parallel_plan(size)
    except ValueError as error:
        raise ValueError(f"{layer_name(index)} ({type(layer).__name__}): {error}") from error
    for path, style in plan.items():
        where = f"{layer_name(index)} ({type(layer).__name__}): tensor_parallel_plan"
        if style not in STYLES:
            raise ValueError(unknown_name(f"{where}: style of {path!r}", style, STYLES))
        try:
            layer.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"{where} names {path!r}, but the layer has no such submodule") from error
    return plan


def check_plans(specs: Sequence[Any], size: int) -> None:
    """Refuse a model that cannot be divided over ``size`` ranks, before anything of it is built.

    Args:
        specs: The model's layers, as given to ``PipelineModule``.
        size: Ranks of the ``model`` axis.

    Raises:
        ValueError: A layer cannot be divided so, no layer can be divided at all, or tied layers whose weight is divided
            use it in a way that does not know.
    """
    layers = _built(specs)
    divided = False
    for index, spec, layer in layers:
        plan = plan_of(index, layer, size)
        divided |= bool(plan)
        forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
        if plan and forward_fn is not None and not getattr(forward_fn, "divisible", False):
            raise ValueError(
                f"{layer_name(index)}: tensor_parallel.size={size} divides the weight of {type(layer).__name__}, but "
                f"forward_fn {getattr(forward_fn, '__name__', forward_fn)!r} uses it as a whole; take one that calls "
                "the module's own methods and mark it by the attribute divisible = True, use a layer of its own in "
                "place of the tied one, or set tensor_parallel.size: 1"
            )
    if not divided:
        names = sorted({type(layer).__name__ for _, _, layer in layers})
        raise ValueError(
            f"tensor_parallel.size={size}, but none of the model's layers ({', '.join(names)}) says how it is divided, "
            "so every rank would compute the same; give a layer a method tensor_parallel_plan(size), or set size: 1"
        )


def _built(specs: Sequence[Any]) -> list[tuple[int, Any, nn.Module]]:
    """The layers on the meta device; one that cannot be built there is left to the real building."""
    built: list[tuple[int, Any, nn.Module]] = []
    for index, spec in enumerate(specs):
        if isinstance(spec, nn.Module):
            built.append((index, spec, spec))
        elif isinstance(spec, LayerSpec):
            with suppress(Exception), torch.device("meta"):  # some constructors read values; theirs are built later on
                built.append((index, spec, spec.build()))
    return built
