"""Layers that share weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.pipe.layer_facts import LayerFacts
from penstock.pipe.layer_spec import TiedLayerSpec, layer_name


@dataclass(frozen=True, slots=True)
class Tie:
    """What the layers of one tie key share.

    Attributes:
        key: Names the shared weights.
        layers: Canonical indices of all layers of the key, over all stages; the first one is the owner, whose name
            the shared parameters carry.
        attributes: Names of the shared parameters inside the module.
    """

    key: str
    layers: tuple[int, ...]
    attributes: tuple[str, ...]

    @property
    def owner(self) -> int:
        """Canonical index of the first layer of the key."""
        return self.layers[0]


def find_ties(layers: Sequence[Any], facts: Sequence[LayerFacts]) -> dict[str, Tie]:
    """The ties between layers, by key.

    Args:
        layers: The model's layers, of which :class:`TiedLayerSpec` count here.
        facts: For each layer, what it builds.

    Raises:
        ValueError: Layers of one key that cannot share their weights on any partition.
    """
    groups: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, TiedLayerSpec):
            groups.setdefault(layer.key, []).append(index)
    return {key: _tie(key, indices, layers, facts) for key, indices in groups.items()}


def _tie(key: str, indices: list[int], layers: Sequence[Any], facts: Sequence[LayerFacts]) -> Tie:
    first = indices[0]
    owner = layers[first]
    assert isinstance(owner, TiedLayerSpec)
    parameters = facts[first].parameters
    for name in owner.tied_weight_attr:
        if name not in parameters:
            raise ValueError(
                f"tied layers {key!r}: {owner.name} has no parameter {name!r}, its parameters are "
                f"{', '.join(parameters) or '(none)'}; set tied_weight_attr"
            )
    left_out = [name for name in parameters if name not in owner.tied_weight_attr]
    if left_out:
        raise ValueError(
            f"tied layers {key!r}: {owner.name} also has {', '.join(left_out)}, which tied_weight_attr does not name; "
            f"set tied_weight_attr={list(parameters)}, or build the module without them"
        )
    for index in indices[1:]:
        other = layers[index]
        assert isinstance(other, TiedLayerSpec)
        both = f"tied layers {key!r}: {layer_name(index)} ({other.name}) and {layer_name(first)} ({owner.name})"
        if facts[index].module_type is not facts[first].module_type:
            raise ValueError(f"{both} build different modules; give both the same module and use forward_fn to call it")
        if set(other.tied_weight_attr) != set(owner.tied_weight_attr):
            raise ValueError(
                f"{both} name different tied_weight_attr, {list(other.tied_weight_attr)} and "
                f"{list(owner.tied_weight_attr)}"
            )
        found = facts[index].parameters
        if found != parameters:
            raise ValueError(
                f"{both} have different parameters, {found} and {parameters}; give both the same arguments"
            )
    return Tie(key, tuple(indices), owner.tied_weight_attr)
