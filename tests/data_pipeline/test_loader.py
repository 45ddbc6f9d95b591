"""Datasets become batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from penstock.data_pipeline import create_data_loader, process_dataset, register_components
from penstock.data_pipeline.data_sampling import DataSampler
from penstock.data_pipeline.datasets import IndexedDatasetBuilder
from support.loop_models import make_points

# From Python 3.12 on, a fork beside another thread (the timeout's) warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    with IndexedDatasetBuilder(tmp_path / "c", np.uint16) as builder:
        for start in range(0, 40, 8):
            builder.add_document(np.arange(start, start + 8))
    return tmp_path / "c"


def test_windows_of_a_path_become_inputs_and_labels(corpus: Path) -> None:
    loader = create_data_loader(corpus, {"length": 6, "data_loader_params": {"batch_size": 4}})
    batches = list(loader)
    assert [inputs.shape for inputs, _ in batches] == [(4, 6), (2, 6)]
    inputs = torch.cat([inputs for inputs, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert inputs.flatten().tolist() == list(range(36))
    assert labels.flatten().tolist() == list(range(1, 37))
    assert inputs.dtype == labels.dtype == torch.int64


def test_documents_of_differing_length_are_padded(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1, 2, 3, 4], [5, 6]]}), tmp_path / "t.parquet")
    ((inputs, labels),) = create_data_loader(tmp_path / "t.parquet", {"data_loader_params": {"batch_size": 2}})
    assert inputs.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert labels.tolist() == [[2, 3, 4], [6, -100, -100]]
    config = {"collate": {"name": "tokens", "pad_token": 9, "multiple_of": 4}, "data_loader_params": {"batch_size": 2}}
    ((inputs, _),) = create_data_loader(tmp_path / "t.parquet", config)
    assert inputs.tolist() == [[1, 2, 3, 9], [5, 9, 9, 9]]


def test_workers_give_the_same_batches(corpus: Path) -> None:
    def read(workers: int) -> list[Any]:
        parameters = {"batch_size": 2, "num_workers": workers, "shuffle": True}
        loader = create_data_loader(corpus, {"length": 4, "seed": 5, "data_loader_params": parameters})
        return [inputs.tolist() for inputs, _ in loader]

    alone = read(0)
    assert alone == read(2)
    assert alone == read(0)
    assert sorted(token for batch in alone for row in batch for token in row) == list(range(36))


def test_a_torch_dataset_is_collated_by_torch() -> None:
    dataset = make_points(4)
    ((x, y),) = create_data_loader(dataset, {"data_loader_params": {"batch_size": 4}})
    assert torch.equal(x, dataset.tensors[0])
    assert torch.equal(y, dataset.tensors[1])
    loader = create_data_loader(dataset)
    assert isinstance(loader, DataLoader)
    assert len(loader) == 4
    collate: Any = lambda rows: len(rows)  # noqa: E731
    assert list(create_data_loader([1, 2, 3], {"collate": collate, "data_loader_params": {"batch_size": 2}})) == [2, 1]


def test_transforms_run_in_order_when_a_sample_is_read() -> None:
    register_components(transform={"test_loader_double": lambda sample: sample * 2}, replace=True)
    dataset = process_dataset([1, 2, 3], ["test_loader_double", lambda sample: sample + 1])
    assert [dataset[i] for i in range(len(dataset))] == [3, 5, 7]
    config = {"transform": "test_loader_double", "data_loader_params": {"batch_size": 3}}
    assert next(iter(create_data_loader([1, 2, 3], config))).tolist() == [2, 4, 6]


def test_a_sampler_decides_what_is_in_a_batch(corpus: Path) -> None:
    config = {"strategy": "random", "batch_size": 2, "seed": 3, "epochs": 2, "drop_last": True}
    # Where windows are cut does not matter.
    for settings in ({"length": 6, "sampling": config}, {"sampling": {**config, "length": 6}}):
        loader = create_data_loader(corpus, settings)
        starts = torch.cat([inputs[:, 0] for inputs, _ in loader]).tolist()
        order = DataSampler(corpus, {**config, "length": 6}).sample_at(np.arange(12))
        assert starts == [6 * int(index) for index in order]
        assert sorted(starts[:6]) == sorted(starts[6:]) == [0, 6, 12, 18, 24, 30]


def test_a_samplers_transforms_see_the_batch_before_it_is_collated(corpus: Path) -> None:
    sampling = {"strategy": "sequential", "batch_size": 2, "transforms": [{"name": "truncate", "length": 4}]}
    batches = list(create_data_loader(corpus, {"sampling": sampling}))
    assert [inputs.tolist() for inputs, _ in batches] == [
        [[0, 1, 2], [8, 9, 10]],
        [[16, 17, 18], [24, 25, 26]],
        [[32, 33, 34]],
    ]
    numbers = create_data_loader(
        [[1.0], [3.0]], {"sampling": {**sampling, "transforms": [lambda row: np.array(row) * 2]}}
    )
    assert next(iter(numbers)).tolist() == [[2.0], [6.0]]


class _Stream:
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


class _TorchStream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_read_once_by_all_workers_together(workers: int) -> None:
    parameters = {"batch_size": 3, "num_workers": workers}
    loader = create_data_loader(_Stream(), {"transform": lambda n: n + 1, "data_loader_params": parameters})
    for _ in range(2):
        assert sorted(torch.cat(list(loader)).tolist()) == list(range(1, 11))


def test_a_torch_stream_is_left_as_it_is() -> None:
    stream = _TorchStream()
    assert process_dataset(stream) is stream
    assert torch.cat(list(create_data_loader(stream, {"transform": lambda n: -n}))).tolist() == [-n for n in range(10)]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"data_loader_parms": {}}, "did you mean 'data_loader_params'"),
        ({"data_loader_params": {"batchsize": 3}}, "unknown parameter 'batchsize'; did you mean 'batch_size'"),
        ({"data_loader_params": {"dataset": []}}, "first argument"),
        ({"data_loader_params": {"batch_size": -1}}, "data_loader_params: batch_size"),
        ({"data_loader_params": {"prefetch_factor": 2}}, "data_loader_params: prefetch_factor"),
        (
            {"data_loader_params": {"batch_sampler": [[0]], "shuffle": True, "batch_size": 2}},
            "batch_size, shuffle must be",
        ),
        ({"data_loader_params": {"sampler": SequentialSampler([0]), "shuffle": True}}, "shuffle must be left out"),
        ({"data_loader_params": {"batch_size": 2}, "sampling": {}}, "batch_size. and sampling both decide"),
        ({"data_loader_params": {"collate_fn": list}, "collate": "default"}, "both say how to collate"),
        ({"data_loader_params": {"generator": torch.Generator()}, "seed": 1}, "where randomness comes from"),
        ({"collate": "token"}, "did you mean 'tokens'"),
        ({"collate": {"name": "tokens", "pad": 3}}, "did you mean 'pad_token'"),
        ({"transform": "no_such"}, "unknown transform 'no_such'"),
        ({"transform": [3]}, "expected a callable"),
        ({"length": 4}, "not a stream"),
        ({"column": "x"}, "not a table"),
    ],
)
def test_mistakes_in_the_configuration(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        create_data_loader([[1, 2], [3, 4]], config)


def test_what_has_no_indices_cannot_be_sampled_or_shuffled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read in its own order"):
        create_data_loader(_Stream(), {"sampling": {"strategy": "random"}})
    with pytest.raises(ValueError, match="shuffle chooses samples by index"):
        create_data_loader(_Stream(), {"data_loader_params": {"shuffle": True}})
    with pytest.raises(ValueError, match="no such file"):
        create_data_loader(tmp_path / "missing", {})
