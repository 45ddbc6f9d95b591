"""Small whole runs whose steps differ in samples and tokens, on one process or on the ranks of a pool."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

import penstock
from support.run_jobs import LENGTH, VOCAB, model


def rows(count: int = 60, seed: int = 5) -> list[np.ndarray[Any, Any]]:
    """Rows of 2 to ``LENGTH + 1`` tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, size=size) for size in rng.integers(2, LENGTH + 2, size=count)]


def job(
    rank: int, world_size: int, settings: dict[str, Any], ragged: bool, folder: str | None, load: bool, steps: int
) -> list[tuple[float, float, int, int]]:
    """Train ``steps`` steps, from and to a checkpoint in ``folder``; loss, rate, samples and tokens of each."""
    torch.set_num_threads(1)
    data = rows() if ragged else [row[: LENGTH + 1] for row in np.random.default_rng(1).integers(0, VOCAB, (60, 25))]
    reports = []
    with penstock.initialize(model(dropout=0.0), settings, training_data=data) as engine:
        if load:
            engine.load_checkpoint(str(folder))
        for _ in range(steps):
            engine.train_batch()
            report = engine.last
            assert report is not None
            reports.append((report.loss, report.lr, report.samples, report.tokens))
        if folder is not None:
            engine.save_checkpoint(Path(folder))
    return reports
