"""One rank of a run that only reads: killed and started again by the test of the order's elasticity."""

import os
from pathlib import Path
from typing import Any, Final

from torch.utils.data import DataLoader

from penstock._core.files import read_json, write_json
from penstock.data_pipeline.data_sampling import DataSampler

BATCH: Final = 12
EVERY: Final = 3
"""Batches between checkpoints."""
DEADLINE_S: Final = 30.0
VALUES: Final = [7, 1, 5, 3, 1, 9, 2, 8, 4, 6, 5, 3, 2]


def rank_job(folder: Path, config: dict[str, Any], rank: int, ranks: int, workers: int, steps: int, gate: Any) -> None:
    """Train up to ``steps`` batches from the checkpoint on, noting each in a file of this rank."""
    sampler = DataSampler(VALUES, {**config, "batch_size": BATCH, "num_replicas": ranks, "rank": rank})
    if (folder / "state.json").exists():
        sampler.load_state_dict(read_json(folder / "state.json"))
    loader = DataLoader(
        range(len(VALUES)),  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=list,
    )
    with (folder / f"rank_{rank}").open("a") as log:
        for done, batch in enumerate(loader, 1):
            log.write(f"{sampler.consumed} {' '.join(map(str, batch))} end\n")
            log.flush()
            gate.wait(DEADLINE_S)
            sampler.mark_trained()
            if rank == 0 and (done % EVERY == 0 or done == steps):
                write_json(folder / "state.json", sampler.state_dict())
            if done == steps:
                break
    os._exit(0)  # without the parent's clean-up
