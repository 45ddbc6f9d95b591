"""Where gradients may be at all: elsewhere compression would make one of its scale, which is cut off."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

from penstock._core.suggest import unknown_name


def check_masks(masks: Iterable[str], known: Collection[str]) -> None:
    """Raise ``ValueError`` for a mask of a parameter that there is not."""
    for name in masks:
        if name not in known:
            raise ValueError(unknown_name("parameter in masks:", name, known))


def flat_mask(
    flat: Tensor, names: Sequence[str], views: Sequence[Tensor], masks: Mapping[str, Tensor]
) -> Tensor | None:
    """The masks of some parameters in a flat buffer.

    Args:
        flat: A buffer of its own; filled with 1 where a gradient may be, 0 elsewhere.
        names: The parameters' names.
        views: Their views into it.
        masks: By name, of the parameter's shape or one that broadcasts to it.

    Returns:
        ``flat``; None if no parameter has a mask.

    Raises:
        ValueError: A mask does not fit its parameter.
    """
    if not any(name in masks for name in names):
        return None
    flat.fill_(1)
    for name, view in zip(names, views, strict=True):
        if name not in masks:
            continue
        try:
            view.copy_(masks[name].expand_as(view) != 0)
        except RuntimeError as error:
            raise ValueError(
                f"the mask of {name} has shape {tuple(masks[name].shape)}, which does not broadcast to the parameter's "
                f"{tuple(view.shape)}; give one of its shape, or [rows, 1]"
            ) from error
    return flat
