"""Which layers of a model are recomputed in the backward pass, by the names of their classes."""

from collections.abc import Sequence

from penstock._core.suggest import unknown_name


def check_recomputed(interval: object, layers: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Check the two ways of saying what is recomputed.

    Args:
        interval: Layers of a group; 0 forms no groups.
        layers: Names of classes whose layers are recomputed one by one.
        names: The class name of each of the model's layers.

    Returns:
        ``layers`` as a tuple.

    Raises:
        ValueError: Both are given, the interval is no number of layers, or the model has no layer of a name.
    """
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 0:
        raise ValueError(
            f"activation_checkpoint_interval must be 0 (keep all activations) or a number of layers, got {interval!r}"
        )
    if isinstance(layers, str):
        raise ValueError(f"activation_checkpoint_layers is a list of class names, got {layers!r}; write [{layers!r}]")
    if interval and layers:
        raise ValueError(
            f"activation_checkpoint_interval={interval} recomputes all layers and activation_checkpoint_layers="
            f"{list(layers)} some; set one of them"
        )
    for name in layers:
        if name not in names:
            raise ValueError(unknown_name("activation_checkpoint_layers: layer class", name, sorted(set(names))))
    return tuple(layers)
