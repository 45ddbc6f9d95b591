"""The sampler under torch's DataLoader: two workers run ahead, the run is stopped and goes on where training stood.

python examples/sampler_dataloader.py
"""

import json
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from penstock.data_pipeline.data_sampling import DataSampler

SAMPLES = 40


def make_sampler() -> tuple[TensorDataset, DataSampler]:
    """Numbered samples, and their order: two epochs in batches of 8."""
    dataset = TensorDataset(torch.arange(SAMPLES))
    return dataset, DataSampler(dataset, {"strategy": "random", "batch_size": 8, "epochs": 2, "seed": 1})


def train(folder: Path, *, stop_after: int | None = None) -> list[int]:
    """Train until the end or for so many batches, from what ``folder`` holds; gives the samples trained on."""
    dataset, sampler = make_sampler()
    state = folder / "sampler.json"
    if state.exists():
        sampler.load_state_dict(json.loads(state.read_text()))
    seen: list[int] = []
    for (batch,) in DataLoader(dataset, batch_sampler=sampler, num_workers=2):
        seen += batch.tolist()  # train on it
        sampler.mark_trained()
        state.write_text(json.dumps(sampler.state_dict()))
        if len(seen) == 8 * (stop_after or len(sampler)):
            break
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print("trained on", train(Path(name), stop_after=3))
        print("then on   ", train(Path(name)))
