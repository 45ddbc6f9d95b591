"""Which layers of a model are recomputed in the backward pass, by the names of their classes or by their numbers."""

from collections.abc import Collection, Sequence

from penstock._core.suggest import unknown_name


def check_recomputed(interval: object, layers: Sequence[str | int], names: Sequence[str]) -> tuple[str | int, ...]:
    """Check the two ways of saying what is recomputed.

    Args:
        interval: Layers of a group; 0 forms no groups.
        layers: Names of classes whose layers are recomputed one by one, and numbers of such layers, from 0.
        names: The class name of each of the model's layers.

    Returns:
        ``layers`` as a tuple.

    Raises:
        ValueError: Both are given, the interval is no number of layers, or the model has no such layer.
    """
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 0:
        raise ValueError(
            f"activation_checkpoint_interval must be 0 (keep all activations) or a number of layers, got {interval!r}"
        )
    if isinstance(layers, str):
        raise ValueError(
            f"activation_checkpoint_layers is a list of class names or numbers, got {layers!r}; write [{layers!r}]"
        )
    if interval and layers:
        raise ValueError(
            f"activation_checkpoint_interval={interval} recomputes all layers and activation_checkpoint_layers="
            f"{list(layers)} some; set one of them"
        )
    for layer in layers:
        if isinstance(layer, str):
            if layer not in names:
                raise ValueError(unknown_name("activation_checkpoint_layers: layer class", layer, sorted(set(names))))
        elif isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(names):
            raise ValueError(
                f"activation_checkpoint_layers: there is no layer {layer!r}; the model has layers 0 to {len(names) - 1}"
            )
    return tuple(layers)


def recomputed_layers(layers: Collection[str | int], names: Sequence[str]) -> frozenset[int]:
    """The numbers of the layers that are meant, given each layer's class name."""
    return frozenset(index for index, name in enumerate(names) if index in layers or name in layers)
