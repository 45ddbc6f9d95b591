"""The sampler under a Lightning Trainer: a callback counts the batches trained on and puts the place into checkpoints.

One pass of Lightning's is the sampler's whole run, however many epochs that has. With several devices, give the
sampler ``num_replicas`` and ``rank`` and the Trainer ``use_distributed_sampler=False``.

python examples/sampler_lightning.py
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from penstock.data_pipeline.data_sampling import DataSampler

SAMPLES = 40


def make_sampler() -> tuple[TensorDataset, DataSampler]:
    """Numbered samples, and their order: two epochs in batches of 8."""
    dataset = TensorDataset(torch.arange(SAMPLES))
    return dataset, DataSampler(dataset, {"strategy": "random", "batch_size": 8, "epochs": 2, "seed": 1})


class KeepPlace(L.Callback):
    """Counts batches as trained on once they are, and saves the sampler's place with the model."""

    def __init__(self, sampler: DataSampler) -> None:
        self.sampler = sampler

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """One more batch was trained on."""
        self.sampler.mark_trained()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return self.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint."""
        self.sampler.load_state_dict(state_dict)


class Model(L.LightningModule):
    """One weight; keeps which samples it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[int] = []

    def training_step(self, batch: tuple[torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a batch."""
        self.seen += batch[0].tolist()
        return (self.weight * batch[0].float()).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train(folder: Path, *, stop_after: int | None = None) -> list[int]:
    """Train until the end or for so many batches, from what ``folder`` holds; gives the samples trained on."""
    dataset, sampler = make_sampler()
    model, checkpoint = Model(), folder / "last.ckpt"
    every_step = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=-1 if stop_after is None else stop_after,
        callbacks=[KeepPlace(sampler), every_step],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(dataset, batch_sampler=sampler)
    trainer.fit(model, loader, ckpt_path=str(checkpoint) if checkpoint.exists() else None)
    return model.seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print("trained on", train(Path(name), stop_after=3))
        print("then on   ", train(Path(name)))
