import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock._core.files import CorruptFileError
from penstock.data_pipeline.data_sampling import DataAnalyzer, DataSampler, IndexedDataset, IndexedDatasetBuilder
from penstock.data_pipeline.data_sampling.metrics import count_tokens
from penstock.data_pipeline.datasets.windows import TokenWindows

corpora = st.lists(st.lists(st.integers(0, 30), max_size=8), min_size=1, max_size=20)


def expected_values(corpus: list[list[int]]) -> tuple[list[int], list[float]]:
    counts = Counter(token for sample in corpus for token in sample)
    total = sum(counts.values())
    rarity = [sum(-math.log(counts[t] / total) for t in s) / len(s) if s else 0.0 for s in corpus]
    return [len(sample) for sample in corpus], rarity


def check(dataset: Any, corpus: list[list[int]], directory: Path, **options: Any) -> None:
    analysis = DataAnalyzer(dataset, output_dir=directory, **options).run()
    lengths, rarity = expected_values(corpus)
    for found in (analysis, DataAnalyzer.load(directory)):
        assert found.metrics == ("seqlen", "vocabularyrarity")
        assert found.num_samples == len(corpus)
        assert found.num_tokens == sum(lengths)
        assert found.values("seqlen").tolist() == lengths
        assert found.values("vocabularyrarity") == pytest.approx(rarity, abs=1e-12)
        assert found.order("seqlen").tolist() == sorted(range(len(corpus)), key=lambda i: (lengths[i], i))


@given(corpora, st.integers(1, 40))
@settings(max_examples=12)  # each example syncs thirty files
def test_values_by_definition(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[list[int]], batch_tokens: int
) -> None:
    directory = tmp_path_factory.mktemp("analysis")
    with IndexedDatasetBuilder(directory / "d", np.uint16) as builder:
        builder.add_items(corpus, documents=True)
    indexed = IndexedDataset(directory / "d")
    check(indexed, corpus, directory / "indexed", batch_tokens=batch_tokens)
    check([np.array(s, dtype=np.int32) for s in corpus], corpus, directory / "list", batch_tokens=batch_tokens)
    check([{"input_ids": s} for s in corpus], corpus, directory / "dicts", batch_tokens=batch_tokens)
    if indexed.num_tokens > 3:
        windows = TokenWindows(indexed, 3)
        cut = [windows[i].tolist() for i in range(len(windows))]
        check(windows, cut, directory / "windows", batch_tokens=batch_tokens)


def test_user_metrics_and_progress(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    analyzer = DataAnalyzer(
        [{"words": [3, 1]}, {"words": [7]}],
        ["seqlen"],
        tmp_path,
        metric_functions={"largest": lambda tokens, offsets: np.maximum.reduceat(tokens, offsets[:-1])},
        tokens_of=lambda sample: sample["words"],
        batch_tokens=1,
        shard_tokens=1,
        progress=lambda *facts: seen.append(facts),
    )
    assert analyzer.run().values("largest").tolist() == [3, 7]
    assert seen == [("reading", 1, 2), ("reading", 2, 2)]


def _lengths(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """How many samples have each length."""
    return np.bincount(np.diff(offsets), minlength=9)


def _tenths(tokens: np.ndarray, offsets: np.ndarray) -> float:
    return float(tokens.sum()) / 10


@given(corpora, st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=8)  # each example syncs some files
def test_totals_are_sums_over_all_samples(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[list[int]], batch_tokens: int, shard_tokens: int
) -> None:
    directory = tmp_path_factory.mktemp("analysis")
    with IndexedDatasetBuilder(directory / "d", np.uint16) as builder:
        builder.add_items(corpus, documents=True)
    analyzer = DataAnalyzer(
        IndexedDataset(directory / "d"),
        [],
        directory / "a",
        total_functions={"lengths": _lengths, "tenths": _tenths},
        batch_tokens=batch_tokens,
        shard_tokens=shard_tokens,
    )
    for found in (analyzer.run(), DataAnalyzer.load(directory / "a")):
        assert found.metrics == ()
        assert found.totals == ("lengths", "tenths")
        assert found.total("lengths").tolist() == [sum(len(s) == n for s in corpus) for n in range(9)]
        assert found.total("lengths").dtype == np.int64
        assert found.total("tenths").shape == ()
        assert found.total("tenths") == pytest.approx(sum(map(sum, corpus)) / 10)
        assert found.num_tokens == sum(map(len, corpus))
        with pytest.raises(ValueError, match="did you mean 'lengths'"):
            found.total("length")


def test_empty_dataset(tmp_path: Path) -> None:
    analysis = DataAnalyzer([], output_dir=tmp_path).run()
    assert analysis.values("seqlen").tolist() == []
    assert analysis.num_tokens == 0


def test_an_analysis_drives_a_curriculum(tmp_path: Path) -> None:
    corpus = [[1] * n for n in (5, 1, 4, 2, 3)]
    DataAnalyzer(corpus, ["seqlen"], tmp_path / "a").run()
    np.save(tmp_path / "values.npy", np.array([5, 1, 4, 2, 3]))
    for path, kind, low, high in (("a", "value", 2, 5), ("a", "percentile", 40, 100), ("values.npy", "value", 2, 5)):
        metric = {
            "path": str(tmp_path / path),
            "difficulty_type": kind,
            "min_difficulty": low,
            "max_difficulty": high,
            "schedule_type": "fixed_discrete",
            "schedule_config": {"difficulty": [low, high], "max_step": [0]},
        }
        sampler = DataSampler(
            corpus,
            {"strategy": "curriculum", "batch_size": 2, "curriculum": {"metrics": {"seqlen": metric}}},
        )
        assert sorted(next(iter(sampler))) == [1, 3]
        assert sorted(sampler.sample_at(np.arange(5)).tolist()) == [0, 1, 2, 3, 4]


def test_an_analysis_of_other_tokens_drives_no_curriculum(tmp_path: Path) -> None:
    DataAnalyzer([[1] * n for n in (5, 1, 4)], ["seqlen"], tmp_path / "a").run()
    metric = {
        "path": str(tmp_path / "a"),
        "schedule_type": "fixed_discrete",
        "schedule_config": {"difficulty": [9], "max_step": []},
    }
    config = {"strategy": "curriculum", "curriculum": {"metrics": {"seqlen": metric}}}
    with pytest.raises(ValueError, match="the analysis is of other tokens than this dataset's"):
        DataSampler([[2] * n for n in (5, 1, 4)], config)
    DataSampler([[1] * n for n in (5, 1, 4)], config)


def test_damage_is_noticed(tmp_path: Path) -> None:
    DataAnalyzer([[1, 2], [3]], output_dir=tmp_path).run()
    path = tmp_path / "seqlen.values.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match=r"seqlen\.values\.npy: its SHA-256 differs"):
        DataAnalyzer.load(tmp_path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match=r"seqlen\.values\.npy: \d+ bytes, but the manifest lists"):
        DataAnalyzer.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"files": {}, "kind": "something else"}')
    with pytest.raises(CorruptFileError, match="not that of an analysis"):
        DataAnalyzer.load(tmp_path)


@given(st.lists(st.lists(st.integers(0, 50), max_size=9), max_size=5))
def test_counts_of_parts_add_up(parts: list[list[int]]) -> None:
    counts = np.zeros(0, dtype=np.int64)
    for part in parts:
        counts = count_tokens(np.array(part, dtype=np.uint16), counts)
    assert dict(enumerate(counts.tolist())) == {
        token: sum(part.count(token) for part in parts) for token in range(len(counts))
    }


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'seqlen'"):
        DataAnalyzer([], ["seqlem"], tmp_path)
    with pytest.raises(ValueError, match="name each metric once"):
        DataAnalyzer([], ["seqlen", "seqlen"], tmp_path)
    with pytest.raises(ValueError, match="name each metric once"):
        DataAnalyzer([], ["seqlen"], tmp_path, total_functions={"seqlen": _lengths})
    with pytest.raises(ValueError, match="a metric's name becomes a file's"):
        DataAnalyzer([], [], tmp_path, metric_functions={"../x": lambda tokens, offsets: offsets[1:]})
    for option in ("batch_tokens", "vocabulary_size"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            DataAnalyzer([], **{option: 0})
    for dataset, options, message in (
        ([[1, 9]], {"vocabulary_size": 9}, "token numbers run from 1 to 9, but the vocabulary has 9"),
        ([[-1]], {}, "run from -1"),
        ([[1.5]], {}, "sample 0 is no sequence of integer tokens"),
        (["text"], {}, "sample 0 is no sequence of integer tokens"),
        ([{"ids": [1]}], {}, "fields ids; name its tokens with tokens_of"),
        ([[1]], {"metric_functions": {"f": lambda tokens, offsets: offsets}}, "one number for each of 1 samples"),
        ([[1]], {"metric_functions": {"f": lambda tokens, offsets: [np.nan]}}, "gives sample 0 the value nan"),
        ([[1]], {"metric_functions": {"f": lambda tokens, offsets: np.array([2**63 + 5], np.uint64)}}, "up to 92233"),
        (
            [[1]],
            {"total_functions": {"f": lambda tokens, offsets: np.uint64(2**63)}},
            "total 'f' has the whole number 92",
        ),
        ([[1]], {"total_functions": {"f": lambda tokens, offsets: ["x"]}}, "total 'f' must give an array of numbers"),
        (
            [[1]],
            {"total_functions": {"f": lambda tokens, offsets: np.inf}},
            "samples 0 to 0 a number that is not",
        ),
        ([], {"total_functions": {"f": lambda tokens, offsets: 1}}, "no samples, so nothing can be added up: f"),
        (
            [[1], [2, 3]],
            {"total_functions": {"f": lambda tokens, offsets: tokens}, "batch_tokens": 1},
            r"shape \(1,\) for the first samples but \(2,\) for samples 1 to 1",
        ),
        (
            [[1], [2]],
            {"total_functions": {"f": lambda tokens, offsets: 1 if 1 in tokens else 0.5}, "batch_tokens": 1},
            "total 'f' gives whole numbers for the first samples but float64 for samples 1 to 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            DataAnalyzer(dataset, output_dir=tmp_path / "x", **options).run()
    assert not (tmp_path / "x").exists()


def test_integer_types_may_differ_from_sample_to_sample(tmp_path: Path) -> None:
    corpus = [[1, 2], [3, 4, 1], [], [5]]
    kinds = [np.uint64, np.int64, np.float64, np.uint8]  # an empty list is float64 to numpy
    check([np.array(s, dtype=kind) for s, kind in zip(corpus, kinds, strict=True)], corpus, tmp_path)


def test_floats_have_a_length_but_no_frequency(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "floats", np.float32) as builder:
        builder.add_document([0.5, 1.5])
    floats = IndexedDataset(tmp_path / "floats")
    assert DataAnalyzer(floats, ["seqlen"], tmp_path / "a").run().values("seqlen").tolist() == [2]
    with pytest.raises(ValueError, match="only integer tokens can be counted, got float32"):
        DataAnalyzer(floats, output_dir=tmp_path / "b").run()
