"""What every rank of a run must have been started with alike."""

from collections.abc import Mapping
from typing import Any, Final

from penstock.data_pipeline.data_sampling import DataSampler
from penstock.runtime.config import TrainConfig

# Hosts may keep data and results in different places, and show progress differently. What the sampling section leads
# to is compared below by the order itself, since it too may name files.
_MAY_DIFFER: Final = frozenset(
    {"output", "deadline_s", "data.train", "data.heldout", "data.tokenizer", "sampling", "train.log_every"}
)


def run_facts(config: TrainConfig, order: DataSampler | None) -> dict[str, Any]:
    """Facts for :func:`penstock.pipe.agreement.agree`: the configuration by dotted key, the data and its order.

    Ranks that train on different data or with different optimizers need not fail by themselves: they may go on with
    wrong numbers, or end in an error of the network layer that names neither.
    """
    facts = {key: value for key, value in flat(config.to_dict()).items() if key not in _MAY_DIFFER}
    if order is not None:
        facts["samples in the training data"] = len(order.data)
        facts["order of the training samples (strategy, seed, curriculum)"] = order.fingerprint()
    return facts


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table by dotted keys; what may differ between ranks stays whole."""
    result: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in _MAY_DIFFER:
            result |= flat(value, f"{key}.")
        else:
            result[key] = value
    return result
