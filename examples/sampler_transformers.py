"""The sampler under the Hugging Face Trainer, which passes over the batches that a checkpoint counts as trained on.

The sampler's whole run is one of the Trainer's epochs. The Trainer skips by the step in its own checkpoint, which is
quick: batches that are passed over are never read. With several processes, give the sampler ``num_replicas`` and
``rank``; the loader is not to be prepared by Accelerate, which would share it out once more.

python examples/sampler_transformers.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from penstock.data_pipeline.data_sampling import DataSampler

SAMPLES = 40


class Numbers(Dataset[dict[str, torch.Tensor]]):
    """Numbered samples."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor(index)}


def make_sampler() -> tuple[Numbers, DataSampler]:
    """Numbered samples, and their order: two epochs in batches of 8."""
    dataset = Numbers()
    return dataset, DataSampler(dataset, {"strategy": "random", "batch_size": 8, "epochs": 2, "seed": 1})


class Model(torch.nn.Module):
    """One weight; keeps which samples it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[int] = []

    def forward(self, number: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of a batch."""
        self.seen += number.tolist()
        return {"loss": (self.weight * number.float()).mean()}


class SampledTrainer(Trainer):
    """A Trainer whose batches a :class:`DataSampler` chooses."""

    def __init__(self, sampler: DataSampler, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.sampler = sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The sampler's batches, in its order."""
        assert self.train_dataset is not None
        return DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator)


def train(folder: Path, *, stop_after: int | None = None) -> list[int]:
    """Train until the end or for so many batches, from what ``folder`` holds; gives the samples trained on."""
    dataset, sampler = make_sampler()
    model = Model()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        max_steps=-1 if stop_after is None else stop_after,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = SampledTrainer(sampler, model=model, args=arguments, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return model.seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print("trained on", train(Path(name), stop_after=3))
        print("then on   ", train(Path(name)))
