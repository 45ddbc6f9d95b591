import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from penstock.data_pipeline.data_sampling import DataSampler, IndexedDatasetBuilder

VALUES = [7, 1, 5, 3, 1, 9, 2, 8, 4, 6, 5, 3]


def curriculum(values: Any = VALUES, **changes: Any) -> dict[str, Any]:
    schedule = {"total_curriculum_step": 8, "difficulty_step": 2}
    metric = {"values": values, "min_difficulty": 3, "max_difficulty": 9, "schedule_type": "fixed_linear"}
    return {
        "strategy": "curriculum",
        "batch_size": 4,
        "epochs": 10,
        "curriculum": {"metrics": {"m": {**metric, "schedule_config": schedule}}},
        **changes,
    }


CONFIGS: list[dict[str, Any]] = [
    {"strategy": "sequential", "batch_size": 4, "epochs": 3},
    {"strategy": "random", "batch_size": 4, "epochs": 3, "seed": 5},
    {"strategy": "stratified", "labels": [value % 2 for value in VALUES], "batch_size": 4, "epochs": 3},
    {"strategy": "weighted", "weights": VALUES, "batch_size": 4, "epochs": 3},
    {"strategy": "weighted", "weights": VALUES, "replacement": True, "batch_size": 4, "epochs": 3},
    curriculum(),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["strategy"])
def test_replicas_share_one_global_order(config: dict[str, Any]) -> None:
    whole = list(DataSampler(VALUES, config))
    assert [index for batch in whole for index in batch] == DataSampler(VALUES, config).sample_at(
        np.arange(DataSampler(VALUES, config).num_samples)
    ).tolist()
    for replicas in (2, 4):
        parts = [list(DataSampler(VALUES, {**config, "num_replicas": replicas, "rank": r})) for r in range(replicas)]
        assert [[index for part in batch for index in part] for batch in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["strategy"])
@given(data=st.data())
@settings(max_examples=25)
def test_any_stops_and_replicas_give_the_uninterrupted_order(config: dict[str, Any], data: st.DataObject) -> None:
    expected = list(DataSampler(VALUES, config))
    got: list[list[int]] = []
    state: dict[str, Any] | None = None
    while len(got) < len(expected):
        replicas = data.draw(st.sampled_from([1, 2, 4]))
        samplers = [DataSampler(VALUES, {**config, "num_replicas": replicas, "rank": r}) for r in range(replicas)]
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(json.loads(json.dumps(state)))
        iterators = [iter(sampler) for sampler in samplers]
        assert len(samplers[0]) == len(expected)
        assert samplers[0].batches_left == len(expected) - len(got)
        trained = data.draw(st.integers(1, len(expected) - len(got)))
        prefetched = data.draw(st.integers(0, 2))
        for _ in range(trained):
            got.append([index for iterator in iterators for index in next(iterator)])
            for sampler in samplers:
                sampler.mark_trained()
        for _ in range(prefetched):
            next(iterators[0], None)
        state = samplers[-1].state_dict()
        assert state["step"] == len(got)
        assert state["consumed"] == 4 * len(got)
    assert got == expected


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 99))
def test_every_curriculum_sample_is_admissible_at_its_position(values: list[int], batch: int, seed: int) -> None:
    config = curriculum([*values, 3], batch_size=batch, seed=seed)
    sampler = DataSampler([*values, 3], config)
    drawn = sampler.sample_at(np.arange(sampler.num_samples)).tolist()
    for k, sample in enumerate(drawn):
        assert [*values, 3][sample] <= sampler.difficulty_at(k)["m"]
    assert sampler.num_excluded == sum(value > 9 for value in values)
    assert sampler.epoch_size == len(values) + 1 - sampler.num_excluded


def test_curriculum_starts_easy_and_ends_with_everything() -> None:
    sampler = DataSampler(VALUES, curriculum())
    assert {VALUES[index] for index in next(iter(sampler))} <= {1, 2, 3}
    # 3 + 6 * s / 8 in steps of 2 from the minimum: 3, 3, 4, 4, 6, 6, 6, 8, 9.
    assert [sampler.difficulty_at(4 * step)["m"] for step in range(9)] == [3, 3, 4, 4, 6, 6, 6, 8, 9]
    assert set(sampler.sample_at(np.arange(32, 32 + 24)).tolist()) == set(range(12))


def test_no_epoch_is_sorted_before_it_is_asked_for() -> None:
    """The races of weighted draws are sorted whole, so the last chunk of a run must not begin the next one's."""
    config = {"strategy": "weighted", "weights": np.ones(2000), "batch_size": 500, "skip_ranges": [(100, 140)]}
    sampler = DataSampler(range(2000), config)
    asked: list[int] = []
    order = sampler._order
    with pytest.MonkeyPatch.context() as patch:
        arrivals = order._arrivals
        patch.setattr(order, "_arrivals", lambda epoch: (asked.append(epoch), arrivals(epoch))[1])
        near = [sampler.sample_at(np.arange(k, min(k + 500, 1960))) for k in range(0, 1960, 500)]
        assert set(asked) == {0}
        assert sampler.sample_at([1959, 1960]).tolist() == order(np.array([1999, 2000])).tolist()
    places = np.concatenate([np.arange(100), np.arange(140, 2000)])
    assert np.concatenate(near).tolist() == order(places).tolist()


def test_sample_at_is_the_same_near_and_far_and_in_any_shape() -> None:
    sampler = DataSampler(range(10_007), {"strategy": "random"})
    far = sampler.sample_at(np.arange(30_000))  # over several chunks: worked out at once
    near = np.concatenate(
        [DataSampler(range(10_007), {}).sample_at(np.arange(k, k + 500)) for k in range(0, 30_000, 500)]
    )
    assert far.tolist() == near.tolist()
    straddling = np.array([[4095, 4096], [2100, 4000]])
    assert DataSampler(range(10_007), {}).sample_at(straddling).tolist() == far[straddling].tolist()
    assert sampler.sample_at(7).shape == ()
    assert sampler.sample_at([]).shape == (0,)
    with pytest.raises(ValueError, match="positions count from 0, got -1"):
        sampler.sample_at([3, -1])
    with pytest.raises(ValueError, match="positions are integers, got float64"):
        sampler.sample_at(1.5)


def test_loader_workers_change_nothing_and_do_not_count() -> None:
    dataset = TensorDataset(torch.arange(len(VALUES)))
    for workers in (0, 2):
        sampler = DataSampler(dataset, CONFIGS[1])
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
        got = []
        for (batch,) in loader:
            got.append(batch.tolist())
            if len(got) == 3:
                break
            sampler.mark_trained()
        assert got == list(DataSampler(dataset, CONFIGS[1]))[:3]
        assert sampler.consumed == 8


def test_last_batch() -> None:
    assert [len(b) for b in DataSampler(range(10), {"batch_size": 4})] == [4, 4, 2]
    assert [len(b) for b in DataSampler(range(10), {"batch_size": 4, "drop_last": True})] == [4, 4]
    assert len(DataSampler(range(10), {"batch_size": 4, "drop_last": True})) == 2
    sampler = DataSampler(range(10), {"batch_size": 4, "num_samples": 25})
    assert [len(b) for b in sampler] == [4] * 6 + [1]
    sampler.mark_trained(7)
    assert sampler.consumed == 25
    assert list(sampler) == []
    with pytest.raises(ValueError, match="1 batches were marked as trained on, but 0 are left"):
        sampler.mark_trained()


def test_consumed_may_stand_anywhere() -> None:
    sampler = DataSampler(range(10), {"strategy": "sequential", "batch_size": 4, "drop_last": True})
    sampler.set_consumed(1)
    assert list(sampler) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert sampler.positions_at(1) == range(1, 5)
    with pytest.raises(ValueError, match=r"0\.\.10 \(num_samples\), got 11"):
        sampler.set_consumed(11)


def test_state_of_another_order_is_refused() -> None:
    state = DataSampler(VALUES, curriculum()).state_dict()
    for other in (
        DataSampler(VALUES, curriculum(seed=1)),
        DataSampler(VALUES, curriculum(batch_size=2)),
        DataSampler(VALUES, curriculum([*VALUES[:-1], 9])),
        DataSampler(VALUES, CONFIGS[1]),
    ):
        with pytest.raises(ValueError, match="belongs to another order"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="not a sampler's state"):
        DataSampler(VALUES, curriculum()).load_state_dict({"consumed": 3})
    DataSampler(VALUES, curriculum(epochs=20)).load_state_dict(state)


class Squares:
    """A map-style dataset without a base class."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        return index * index


@pytest.mark.parametrize(
    "kind", ["list", "array", "tensor", "pandas", "arrow", "dataset", "indexed", "parquet", "jsonl"]
)
def test_every_kind_of_source_is_sampled(kind: str, tmp_path: Path) -> None:
    rows = [[n, n + 1] for n in range(6)]
    source: Any
    if kind == "list":
        source = rows
    elif kind == "array":
        source = np.array(rows)
    elif kind == "tensor":
        source = torch.tensor(rows)
    elif kind == "pandas":
        source = pd.DataFrame({"tokens": rows})
    elif kind == "arrow":
        source = pa.table({"tokens": rows})
    elif kind == "dataset":
        source = TensorDataset(torch.tensor(rows))
    elif kind == "indexed":
        source = tmp_path / "d"
        with IndexedDatasetBuilder(source) as builder:
            builder.add_items(rows, documents=True)
    elif kind == "parquet":
        source = tmp_path / "d.parquet"
        pq.write_table(pa.table({"tokens": rows}), source)
    else:
        source = tmp_path / "d.jsonl"
        source.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    sampler = DataSampler(source, {"strategy": "random", "seed": 3})
    samples = sampler.apply_sampling(sampler.load_data())
    tokens = [(sample[0] if kind == "dataset" else sample) for sample in samples]
    assert [np.asarray(sample).tolist() for sample in tokens] == [rows[i] for i in sampler.sample_at(np.arange(6))]


def test_the_pipeline_in_one_call() -> None:
    sampler = DataSampler(
        [[1, 2, 3], [4], [5, 6]],
        {
            "strategy": "sequential",
            "epochs": 2,
            "transforms": [
                {"name": "truncate", "length": 2},
                lambda tokens: tokens * 10,
                {"name": "pack", "length": 4, "separator": 0, "pad_value": -1},
            ],
        },
    )
    packed = [row.tolist() for row in sampler.execute_data_pipeline()]
    assert packed == [[10, 20, 0, 40], [0, 50, 60, 0], [10, 20, 0, 40], [0, 50, 60, 0]]
    assert sampler.preprocess_data([[7, 8, 9]])[0].tolist() == [70, 80, 0, -1]


def test_labels_and_weights_may_be_functions() -> None:
    sampler = DataSampler(Squares(), {"strategy": "stratified", "labels": lambda sample: ["even", "odd"][sample % 2]})
    assert sorted(sampler.sample_at(np.arange(5)).tolist()) == [0, 1, 2, 3, 4]
    weighted = DataSampler(Squares(), {"strategy": "weighted", "weights": lambda sample: float(sample)})
    assert weighted.num_excluded == 1
    assert sorted(weighted.sample_at(np.arange(4)).tolist()) == [1, 2, 3, 4]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(range(3))


METRIC = curriculum()["curriculum"]["metrics"]["m"]


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        (VALUES, {"strateggy": "random"}, "did you mean 'strategy'"),
        (VALUES, {"strategy": "shuffle"}, "strategy"),
        (VALUES, {"batch_size": 0}, "batch_size"),
        (VALUES, {"batch_size": 4, "num_replicas": 3}, "cannot be shared equally by 3 replicas"),
        (VALUES, {"rank": 1}, "rank 1 of 1 replicas"),
        (VALUES, {"num_samples": 4, "epochs": 1}, "not both"),
        (VALUES, {"batch_size": 8, "num_replicas": 8}, "the last global batch has 4 samples, which 8 replicas"),
        (VALUES, {"batch_size": 16, "drop_last": True}, "less than one batch of 16"),
        (VALUES, {"labels": [1]}, "labels is used by strategy 'stratified', but the strategy is 'random'"),
        (VALUES, {"replacement": True}, "used by strategies 'weighted' and 'importance'"),
        (VALUES, {"strategy": "weighted"}, "strategy 'weighted' needs weights"),
        (
            VALUES,
            {"strategy": "weighted", "weights": [1, 2]},
            r"weights: expected one for each of 12 samples, got the shape \(2,\)",
        ),
        (VALUES, {"strategy": "stratified", "labels": [None] * 12}, "labels: expected numbers or strings"),
        (VALUES, {"strategy": "curriculum"}, "needs curriculum"),
        (VALUES, curriculum([1, 2]), r"metric 'm': expected a value for each of 12 samples, got the shape \(2,\)"),
        (VALUES, curriculum([4] * 12), "m starts at value 3 and its smallest value is 4; raise min_difficulty"),
        (VALUES, curriculum(curriculum={"metrics": {}}), "metrics"),
        (VALUES, curriculum(curriculum={"metrics": {"m": {**METRIC, "path": "x"}}}), "either as values or as the path"),
        (
            VALUES,
            curriculum(curriculum={"metrics": {"m": {**METRIC, "values": None, "path": "no.npy"}}}),
            "no such file",
        ),
        (VALUES, curriculum(curriculum={"metrics": {"m": {**METRIC, "values": None, "path": "no"}}}), "missing"),
        (VALUES, {"transforms": ["trunc"]}, "did you mean 'truncate'"),
        ([], {}, "the data source is empty"),
        (Stream(), {}, "can only be iterated"),
        (iter([1]), {}, "can only be iterated"),
        ({"a": [1]}, {}, "table of names"),
        (3, {}, "not a dataset"),
        ("nowhere", {}, "no such file"),
    ],
)
def test_mistakes_are_named(source: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSampler(source, config)


def test_other_mistakes_are_named() -> None:
    sampler = DataSampler(VALUES)
    with pytest.raises(ValueError, match="made for 12 samples, but the data has 3"):
        sampler.apply_sampling([1, 2, 3])
    with pytest.raises(ValueError, match="got -1"):
        sampler.difficulty_at(-1)
    assert sampler.difficulty_at(0) == {}


def test_labels_of_a_pandas_column_are_text() -> None:
    labels = ["a", "b", "a", "c"] * 3
    expected = DataSampler(VALUES, {"strategy": "stratified", "labels": labels}).sample_at(range(12))
    for column in (pd.Series(labels, dtype=object), np.array(labels, dtype=object)):
        found = DataSampler(VALUES, {"strategy": "stratified", "labels": column})
        assert found.sample_at(range(12)).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="numbers or strings, got object"):
        DataSampler(VALUES, {"strategy": "stratified", "labels": ["a", None, 3] * 4})


def test_a_series_is_read_by_position_and_a_number_is_no_data() -> None:
    series = pd.Series([10, 11, 12], index=[2, 0, 1])
    assert DataSampler(series, {"strategy": "sequential"}).execute_data_pipeline() == [10, 11, 12]
    for single in (np.array(3), torch.tensor(3)):
        with pytest.raises(ValueError, match=r"a single .*int64 number"):
            DataSampler(single)
