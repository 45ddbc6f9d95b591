"""Whether a section speaks of the layers and the rows that are there."""

from collections.abc import Sequence
from typing import Final

from penstock.data_pipeline.random_ltd.config import RandomLTDConfig
from penstock.data_pipeline.random_ltd.layer import RandomLayerTokenDrop

_OF_LAYERS: Final = (
    "total_layer_num", "random_ltd_layer_id", "model_mask_name", "hidden_state_order", "route", "arguments",
)  # fmt: skip
_REMEDY: Final = "give convert_to_random_ltd and RandomLTDScheduler the same section"


def check_agreement(
    config: RandomLTDConfig, layers: Sequence[RandomLayerTokenDrop], of_model: Sequence[RandomLayerTokenDrop]
) -> None:
    """Refuse layers that were converted by another section, or are not among those that the section lists.

    Args:
        config: The scheduler's section.
        layers: All layers that it would have charge of; fewer than the section lists may be a part of a pipeline.
        of_model: Those of them that were found in a model, with the ids that they got there. Ids of layers that are
            handed over one by one are the caller's affair.

    Raises:
        ValueError: They disagree; both sides are told.
    """
    for layer in layers:
        for name in _OF_LAYERS if layer.section is not None else ():
            ours, theirs = getattr(config, name), getattr(layer.section, name)
            if ours != theirs:
                raise ValueError(
                    f"the scheduler's section says {name}={_plain(ours)}, but the model was converted with "
                    f"{name}={_plain(theirs)}; {_REMEDY}"
                )
    listed = list(config.random_ltd_layer_id)
    if len(layers) > len(listed):
        raise ValueError(
            f"{len(layers)} layers drop tokens, but the scheduler's section lists {len(listed)}: "
            f"random_ltd_layer_id={listed}; {_REMEDY}"
        )
    known = {config.layer_options(layer_id)["layer_id"] for layer_id in listed}
    others = sorted({layer.layer_id for layer in of_model} - known)
    if others:
        raise ValueError(
            f"the model's layers {others} drop tokens, but the scheduler's section says random_ltd_layer_id={listed}; "
            f"{_REMEDY}"
        )


def told_of_rows(config: RandomLTDConfig, kept: int | None, length: int) -> str | None:
    """What to tell the user of rows that do not go with the section; None if they do.

    Args:
        config: The section.
        kept: Tokens that the layers were to keep; None is all.
        length: Tokens of a row.
    """
    if length > config.full_length:
        said = "max_value" if config.sequence_length is None else "sequence_length"
        return (
            f"random_ltd: rows have {length} tokens, but {said}={config.full_length}: layer-tokens are counted for "
            "so many, and with a max_value below the length of a row tokens are dropped to the end. Set max_value to "
            "that length; or, if tokens are to be dropped to the end, sequence_length"
        )
    if config.sequence_length is None and kept is not None and kept > length:
        return (
            f"random_ltd: layers are to keep {kept} tokens, but rows have {length}: none is dropped. Set max_value to "
            "the length of a row, and min_value below it; or, if rows vary, sequence_length to that of the longest"
        )
    return None


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
