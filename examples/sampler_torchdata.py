"""The sampler under torchdata's StatefulDataLoader, whose state holds the place of what it has given to the training.

python examples/sampler_torchdata.py
"""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from penstock.data_pipeline.data_sampling import DataSampler

SAMPLES = 40


def make_sampler() -> tuple[TensorDataset, DataSampler]:
    """Numbered samples, and their order: two epochs in batches of 8."""
    dataset = TensorDataset(torch.arange(SAMPLES))
    return dataset, DataSampler(dataset, {"strategy": "random", "batch_size": 8, "epochs": 2, "seed": 1})


def train(folder: Path, *, stop_after: int | None = None) -> list[int]:
    """Train until the end or for so many batches, from what ``folder`` holds; gives the samples trained on."""
    dataset, sampler = make_sampler()
    loader: StatefulDataLoader[tuple[torch.Tensor]] = StatefulDataLoader(dataset, batch_sampler=sampler, num_workers=2)
    state = folder / "loader.pt"
    if state.exists():
        loader.load_state_dict(torch.load(state, weights_only=True))
    seen: list[int] = []
    for (batch,) in loader:
        seen += batch.tolist()  # train on it
        torch.save(loader.state_dict(), state)
        if len(seen) == 8 * (stop_after or len(sampler)):
            break
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print("trained on", train(Path(name), stop_after=3))
        print("then on   ", train(Path(name)))
