"""The sampler where others drive it: the examples, stopped and resumed, train on the order of an uninterrupted run."""

import importlib.util
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from penstock.data_pipeline.data_sampling import DataSampler
from penstock.data_pipeline.loader import create_data_loader

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
NAMES = ["dataloader", "torchdata", "lightning", "transformers"]


def example(name: str) -> ModuleType:
    path = EXAMPLES / f"sampler_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # other projects' own
def test_a_stopped_and_resumed_run_sees_the_uninterrupted_order(name: str, tmp_path: Path) -> None:
    module = example(name)
    seen = module.train(tmp_path, stop_after=3)
    assert len(seen) == 24
    seen += module.train(tmp_path)
    _, sampler = module.make_sampler()
    assert seen == sampler.sample_at(np.arange(80)).tolist()


def test_examples_are_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in listed for path in EXAMPLES.glob("*.py"))


def test_what_workers_are_given_can_be_pickled() -> None:
    """Spawned workers get the dataset and the collate function; neither holds the sampler or the whole data."""
    names: list[Any] = [
        {"name": "truncate", "length": 3},
        "normalise",
        {"name": "pad", "length": 4, "value": 1},
        {"name": "pack", "length": 4},
        abs,
    ]
    rows = [[1.0, 2.0, 4.0], [3.0], [5.0, 6.0]] * 400
    loader = create_data_loader(rows, {"sampling": {"transforms": names, "batch_size": 3}, "collate": "default"})
    sent = pickle.dumps(loader.collate_fn)
    assert len(sent) < 2000
    batch = [rows[index] for index in next(iter(loader.batch_sampler))]
    assert pickle.loads(sent)(batch).tolist() == loader.collate_fn(batch).tolist()


def test_spawned_workers_give_the_same_batches() -> None:
    config = {"batch_size": 2, "transforms": [{"name": "pad", "length": 3}], "seed": 1}
    rows = [[n] * (1 + n % 3) for n in range(6)]
    found = {}
    for workers in (0, 1):
        loader = create_data_loader(
            rows,
            {
                "sampling": config,
                "collate": "default",
                "data_loader_params": {"num_workers": workers, "multiprocessing_context": "spawn" if workers else None},
            },
        )
        found[workers] = [batch.tolist() for batch in loader]
    assert found[1] == found[0]


def test_the_length_of_a_loader_is_that_of_the_run() -> None:
    sampler = DataSampler(range(10), {"batch_size": 4, "epochs": 2})
    loader = DataLoader(range(10), batch_sampler=sampler)  # type: ignore[arg-type]
    sampler.mark_trained(3)
    assert (len(loader), len(sampler), sampler.batches_left) == (5, 5, 2)
    iterator = iter(sampler)
    next(iterator)
    state = iterator.state_dict()  # type: ignore[attr-defined]
    again = DataSampler(range(10), {"batch_size": 4, "epochs": 2})
    resumed = iter(again)
    resumed.load_state_dict(state)  # type: ignore[attr-defined]
    assert again.consumed == 16
    assert list(resumed) == list(iterator)
    with pytest.raises(ValueError, match="not the state of an iteration"):
        resumed.load_state_dict({})  # type: ignore[attr-defined]
