"""Layers described before they are built."""

from collections.abc import Callable
from typing import Any

from torch import nn

LayerFactory = Callable[..., nn.Module]
"""A module class, or any callable that returns a module."""


class LayerSpec:
    """A layer to be built later, on the stage that owns it.

    Args:
        typename: A module class, or any callable that returns a module.
        args: Passed to ``typename``.
        kwargs: Passed to ``typename``.

    Raises:
        ValueError: ``typename`` cannot be called, or is a module already.
    """

    def __init__(self, typename: LayerFactory, *args: Any, **kwargs: Any) -> None:
        if isinstance(typename, nn.Module):
            raise ValueError(
                f"LayerSpec takes a module class and its arguments, got an instance of {type(typename).__name__}; "
                "put the instance itself into the list of layers"
            )
        if not callable(typename):
            raise ValueError(
                f"LayerSpec takes a module class or a callable that returns a module, got {typename!r} "
                f"({type(typename).__name__})"
            )
        self.typename = typename
        self.module_args = args
        self.module_kwargs = kwargs

    @property
    def name(self) -> str:
        """Name of the class or callable, as ``type:regex`` partitioning sees it."""
        return callable_name(self.typename)

    def build(self) -> nn.Module:
        """Build the layer, on the current default device and from the current random state.

        Raises:
            ValueError: ``typename`` returned something else than a module.
        """
        module = self.typename(*self.module_args, **self.module_kwargs)
        if not isinstance(module, nn.Module):
            raise ValueError(f"{self.name} returned {type(module).__name__}, a layer must be a torch.nn.Module")
        return module

    def __repr__(self) -> str:
        arguments = [*map(repr, self.module_args), *(f"{k}={v!r}" for k, v in self.module_kwargs.items())]
        return f"{type(self).__name__}({', '.join([self.name, *arguments])})"


class TiedLayerSpec(LayerSpec):
    """A layer that shares its weights with every other one of the same key, on whichever stages they lie.

    Copies of the weights on several stages start equal, and the engine sums their gradients, so they stay equal. All
    specs of one key must build the same module.

    Args:
        key: Names the shared weights.
        typename: As for :class:`LayerSpec`.
        args: Passed to ``typename``.
        forward_fn: Called as ``forward_fn(module, value)`` in place of ``module(value)``: an output head that uses an
            embedding's weight, for instance.
        tied_weight_attr: The shared parameter's attribute name, or a list of them (``"inner.weight"`` reaches into a
            submodule). It must name *every* parameter of the module: one left out would be shared where both layers
            lie on the same stage and not where they lie apart.
        kwargs: Passed to ``typename``.

    Raises:
        ValueError: An empty key, no attribute, or a ``forward_fn`` that cannot be called.
    """

    def __init__(
        self,
        key: str,
        typename: LayerFactory,
        *args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | list[str] | tuple[str, ...] = "weight",
        **kwargs: Any,
    ) -> None:
        super().__init__(typename, *args, **kwargs)
        if not isinstance(key, str) or not key:
            raise ValueError(f"TiedLayerSpec's key must be a non-empty string, got {key!r}")
        if forward_fn is not None and not callable(forward_fn):
            raise ValueError(
                f"TiedLayerSpec {key!r}: forward_fn must be a callable (module, value), got {forward_fn!r}"
            )
        attributes = (tied_weight_attr,) if isinstance(tied_weight_attr, str) else tuple(tied_weight_attr)
        if not attributes or not all(isinstance(name, str) and name for name in attributes):
            raise ValueError(
                f"TiedLayerSpec {key!r}: tied_weight_attr must be an attribute name or a list of them, "
                f"got {tied_weight_attr!r}"
            )
        if len(set(attributes)) < len(attributes):
            raise ValueError(f"TiedLayerSpec {key!r}: tied_weight_attr repeats a name: {list(attributes)}")
        self.key = key
        self.forward_fn = forward_fn
        self.tied_weight_attr = attributes


def callable_name(layer: Any) -> str:
    """The name of a class, function or other callable."""
    name = getattr(layer, "__name__", None)
    return name if isinstance(name, str) else type(layer).__name__


def layer_name(index: int) -> str:
    """The canonical name of a layer: ``layer_000`` for the model's first, whatever the partition."""
    return f"layer_{index:03d}"
