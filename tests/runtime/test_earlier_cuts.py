"""A run that goes on is cut where it was cut, though its cuts were measured."""

from pathlib import Path
from typing import Any

from penstock.runtime.checkpoint import CheckpointWriter
from penstock.runtime.config import TrainConfig, load_config
from penstock.runtime.earlier_cuts import as_cut_before, with_cuts


def config(**pipe: Any) -> TrainConfig:
    return load_config(
        {
            "pipe": {"stages": 2, "partition_method": "profile", **pipe},
            "train": {"global_batch_size": 4, "micro_batch_size": 1, "steps": 3},
        }
    )


def test_measured_cuts_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    assert as_cut_before(config(), tmp_path) == config()
    ran = with_cuts(config(), (0, 3, 5))
    state = {"config": ran.to_dict(), "layout": {"bounds": [0, 3, 5]}}
    CheckpointWriter(tmp_path, 2).seal(state, [])
    goes_on = as_cut_before(config(), tmp_path)
    assert goes_on.pipe.partition_method == (0, 3, 5)
    assert goes_on == ran
    assert load_config(goes_on.to_dict()) == ran  # its file is one that loads
    for other in (config(schedule="zb_v"), config(stages=3), config(partition_method="uniform")):
        assert as_cut_before(other, tmp_path) == other
