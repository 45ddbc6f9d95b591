"""Where a run that is resumed was cut into stages."""

from pathlib import Path
from typing import Final

from penstock.pipe.partition import MEASURED
from penstock.runtime.checkpoint import latest_complete
from penstock.runtime.config import TrainConfig

_SAME_STAGES: Final = ("stages", "schedule", "chunks")


def as_cut_before(config: TrainConfig, checkpoints: Path) -> TrainConfig:
    """The configuration with the cuts of the newest complete checkpoint, where it would have them measured.

    Measured anew they may fall elsewhere; what belongs to a rank alone, such as its error memory, would then be lost,
    and so would the exact continuation of a run whose activations are compressed where it is cut.

    Args:
        config: Of the run that goes on.
        checkpoints: Its directory of checkpoints; without a complete one, or with one of other stages, the cuts are
            left to be measured.
    """
    if config.pipe.partition_method != MEASURED:
        return config
    checkpoint = latest_complete(checkpoints)
    if checkpoint is None:
        return config
    state = checkpoint.read_state()
    then, now = state["config"]["pipe"], config.to_dict()["pipe"]
    if any(then.get(key) != now.get(key) for key in _SAME_STAGES):
        return config
    return with_cuts(config, state["layout"]["bounds"])


def with_cuts(config: TrainConfig, bounds: list[int] | tuple[int, ...]) -> TrainConfig:
    """The configuration with these bounds in place of a method."""
    pipe = config.pipe.model_copy(update={"partition_method": tuple(bounds)})
    return config.model_copy(update={"pipe": pipe})
