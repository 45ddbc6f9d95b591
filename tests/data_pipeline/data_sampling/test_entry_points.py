"""Sorting by entry point in chunks and in files, against the definition by comparing tuples."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock._core.files import CorruptFileError
from penstock.data_pipeline.data_sampling import DataSampler, thresholds
from penstock.data_pipeline.data_sampling.births import DifficultyMetric
from penstock.data_pipeline.data_sampling.curriculum import CurriculumScheduler
from penstock.data_pipeline.data_sampling.entry_points import entry_points, metrics_identity


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "CHUNK", size)
        yield


def discrete(*levels: float) -> CurriculumScheduler:
    details = {"difficulty": list(levels), "max_step": list(range(len(levels) - 1))}
    return CurriculumScheduler({"schedule_type": "fixed_discrete", "schedule_config": details})


def number_lists() -> st.SearchStrategy[np.ndarray[Any, Any]]:
    def of(dtype: str, elements: st.SearchStrategy[Any]) -> st.SearchStrategy[np.ndarray[Any, Any]]:
        return st.lists(elements, min_size=1, max_size=40).map(lambda values: np.array(values, dtype=dtype))

    small = st.integers(-3, 3)
    floats = st.one_of(small.map(float), st.floats(width=32, allow_nan=False), st.just(-0.0))
    wide = st.one_of(small, st.integers(-(2**63), 2**63 - 1))
    return st.one_of(
        of("int8", st.integers(-128, 127)),
        of("int32", small),
        of("int64", wide),
        of("uint16", st.integers(0, 9)),
        of("uint64", st.one_of(st.integers(0, 5), st.integers(2**63, 2**64 - 1))),
        of("float32", floats),
        of("float64", st.floats(allow_nan=False)),
        of(">i4", small),
    )


@given(number_lists(), st.lists(st.integers(1, 100), min_size=1, max_size=6, unique=True), st.integers(1, 50))
def test_percentiles_admit_the_first_of_a_stable_sort(values: Any, percentages: list[int], chunk: int) -> None:
    percentages.sort()
    with chunks_of(chunk):
        found = thresholds.percentile_thresholds(values, percentages, None)
        blocks = np.concatenate([found.blocks(values[part], part.start) for part in thresholds.chunks(len(values))])
    rank = np.empty(len(values), dtype=int)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    admitted = [math.ceil(Fraction(percent * len(values), 100)) for percent in percentages]
    expected = [next((i for i, count in enumerate(admitted) if r < count), len(admitted)) for r in rank.tolist()]
    assert blocks.tolist() == expected
    stored = thresholds.percentile_thresholds(values, percentages, np.argsort(values, kind="stable"))
    assert stored.blocks(values, 0).tolist() == expected


@given(number_lists(), st.lists(st.floats(-300, 300), min_size=1, max_size=6), st.integers(1, 50))
def test_values_admit_what_is_not_above(values: Any, levels: list[float], chunk: int) -> None:
    levels.sort()
    with chunks_of(chunk):
        found = thresholds.value_thresholds(values, levels)
        blocks = np.concatenate([found.blocks(values[part], part.start) for part in thresholds.chunks(len(values))])
    exact = [Fraction(value) if math.isfinite(value) else value for value in values.tolist()]
    expected = [next((i for i, level in enumerate(levels) if value <= level), len(levels)) for value in exact]
    assert blocks.tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9)), min_size=1, max_size=40), st.integers(1, 12))
def test_chunks_and_files_change_nothing(tmp_path_factory: Any, pairs: list[tuple[int, float]], chunk: int) -> None:
    lengths, scores = (np.array(column) for column in zip(*pairs, strict=True))
    metrics = [
        DifficultyMetric("length", lengths, discrete(int(lengths.max()), 9)),
        DifficultyMetric("score", scores, discrete(30, 55.5, 100), "percentile"),
    ]
    whole = entry_points(metrics)
    folder = tmp_path_factory.mktemp("cache")
    with chunks_of(chunk):
        stored = entry_points(metrics, folder)
    assert stored.order.tolist() == whole.order.tolist()
    assert (stored.sizes, stored.steps, stored.never) == (whole.sizes, whole.steps, whole.never)
    assert stored.digest() == whole.digest()
    stored.verify()


def curriculum(path: Path, cache: Path, largest: int = 9, **changes: Any) -> dict[str, Any]:
    metric = {
        "path": str(path),
        "min_difficulty": 3,
        "max_difficulty": largest,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 8, "difficulty_step": 2},
    }
    return {
        "strategy": "curriculum",
        "batch_size": 4,
        "curriculum": {"metrics": {"m": metric}, "cache": str(cache), **changes},
    }


def test_a_second_start_maps_what_the_first_has_sorted(tmp_path: Path) -> None:
    values, cache = tmp_path / "m.npy", tmp_path / "cache"
    np.save(values, np.arange(20) % 10)
    told: list[str] = []
    config = curriculum(values, cache)
    first = DataSampler(range(20), config, progress=lambda what, done, total: told.append(what))
    assert told == ["counting", "sorting"]
    again = DataSampler(range(20), config, progress=lambda what, done, total: told.append(what))
    assert told == ["counting", "sorting"]
    assert again.fingerprint() == first.fingerprint()
    in_memory = DataSampler(range(20), {**config, "curriculum": {**config["curriculum"], "cache": None}})
    assert in_memory.fingerprint() == first.fingerprint()
    for sampler in (again, in_memory):
        assert sampler.sample_at(np.arange(60)).tolist() == first.sample_at(np.arange(60)).tolist()
    DataSampler(range(20), curriculum(values, cache, largest=8))
    np.save(values, np.arange(20)[::-1] % 10)
    DataSampler(range(20), config)
    assert len(list(cache.glob("*/manifest.json"))) == 3  # another schedule and other values are other orders
    assert not list(cache.glob("*.tmp"))


def test_what_a_killed_start_has_left_is_cleared_away(tmp_path: Path) -> None:
    metrics = [DifficultyMetric("m", np.arange(9), discrete(3, 9))]
    sealed = entry_points(metrics, tmp_path)
    assert sealed.folder is not None
    rest = sealed.folder.with_suffix(".tmp")
    sealed.folder.rename(rest)
    (rest / "order.bin").write_bytes(b"half")
    assert entry_points(metrics, tmp_path).order.tolist() == list(range(9))
    assert not rest.exists()


def test_two_processes_sort_once(tmp_path: Path) -> None:
    metrics = [DifficultyMetric("m", np.arange(9), discrete(3, 9))]
    told: list[str] = []
    started = threading.Barrier(2)

    def start() -> None:
        started.wait()
        entry_points(metrics, tmp_path, progress=lambda what, done, total: told.append(what))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == ["counting", "sorting"]


def test_damage_is_named(tmp_path: Path) -> None:
    metrics = [DifficultyMetric("m", np.arange(9), discrete(3, 9))]
    folder = entry_points(metrics, tmp_path).folder
    assert folder is not None
    content = (folder / "order.bin").read_bytes()
    (folder / "order.bin").write_bytes(content[::-1])
    with pytest.raises(CorruptFileError, match="SHA-256 differs"):
        entry_points(metrics, tmp_path).verify()
    (folder / "order.bin").write_bytes(content[:-1])
    with pytest.raises(CorruptFileError, match="35 bytes, but its blocks take 36"):
        entry_points(metrics, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sizes": "many"}))
    with pytest.raises(CorruptFileError, match="not that of stored entry points"):
        entry_points(metrics, tmp_path)


def test_identity_follows_data_and_schedule() -> None:
    def custom(function: Any) -> CurriculumScheduler:
        details = {"total_curriculum_step": 4, "get_difficulty": function}
        return CurriculumScheduler(
            {"min_difficulty": 0, "max_difficulty": 9, "schedule_type": "custom", "schedule_config": details}
        )

    base = DifficultyMetric("m", np.arange(9), custom(lambda step: step))
    same = DifficultyMetric("m", np.arange(9), custom(lambda step: step * 1))
    assert metrics_identity([base]) == metrics_identity([same])
    for other in (
        DifficultyMetric("m", np.arange(9), custom(lambda step: step + 1)),
        DifficultyMetric("m", np.arange(9)[::-1], custom(lambda step: step)),
        DifficultyMetric("m", np.arange(9), discrete(0, 9)),
    ):
        assert metrics_identity([base]) != metrics_identity([other])
