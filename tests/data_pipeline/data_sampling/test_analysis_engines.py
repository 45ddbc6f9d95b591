"""The work as Daft spreads it: results, failures, resumption, and the same on Ray."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from penstock.data_pipeline.data_sampling import (
    Analysis,
    DataAnalyzer,
    IndexedDataset,
    IndexedDatasetBuilder,
    unfinished,
)
from penstock.data_pipeline.data_sampling import analysis as analysis_module
from penstock.data_pipeline.data_sampling.analysis import store_analysis
from penstock.data_pipeline.data_sampling.analyzer import KNOWN_METRICS
from penstock.data_pipeline.data_sampling.engines import map_ranges
from penstock.data_pipeline.data_sampling.unfinished import Unfinished
from penstock.data_pipeline.datasets import TokenWindows


@pytest.fixture
def corpus(tmp_path: Path) -> IndexedDataset:
    rng = np.random.default_rng(5)
    with IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as builder:
        builder.add_items([rng.geometric(0.05, length) for length in rng.integers(0, 40, 500)], documents=True)
    return IndexedDataset(tmp_path / "corpus")


def test_results_come_once_for_each_range_asked_for() -> None:
    found = dict(map_ranges(lambda a, b: [np.arange(a, b)], [0, 3, 3, 10], [0, 2]))
    assert {number: arrays[0].tolist() for number, arrays in found.items()} == {0: [0, 1, 2], 2: [*range(3, 10)]}
    assert list(map_ranges(lambda a, b: [], [0, 3], [])) == []


def test_failures_come_back_as_they_are() -> None:
    def wrong(start: int, stop: int) -> list[np.ndarray]:
        if start >= 6:
            raise ValueError(f"sample {start} is odd")
        return []

    with pytest.raises(ValueError, match="sample 6 is odd"):
        list(map_ranges(wrong, range(0, 9, 2), range(4)))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(map_ranges(lambda a, b: [np.array(1 // a)], [0, 1], [0]))
    with pytest.raises(ValueError, match="did you mean 'ray'"):
        list(map_ranges(wrong, [0, 1], [0], "rya"))  # type: ignore[arg-type]


def test_many_shards_and_batches_make_the_same_analysis(corpus: IndexedDataset, tmp_path: Path) -> None:
    one = DataAnalyzer(corpus, KNOWN_METRICS, tmp_path / "one").run()
    many = DataAnalyzer(corpus, KNOWN_METRICS, tmp_path / "many", shard_tokens=300, batch_tokens=50).run()
    assert one.fingerprint == many.fingerprint
    for metric in KNOWN_METRICS:
        assert one.values(metric) == pytest.approx(many.values(metric), abs=1e-12)
        assert (many.order(metric) == np.argsort(many.values(metric), kind="stable")).all()
    assert one.token_counts().tolist() == np.bincount(corpus.tokens).tolist()
    table = pq.read_table(tmp_path / "many" / "samples.parquet")
    assert table.column_names == ["sample", *KNOWN_METRICS]
    assert table["sample"].to_pylist() == list(range(500))
    assert (table["uniqueratio"].to_numpy() == many.values("uniqueratio")).all()
    files = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert len(files) == 2 * len(KNOWN_METRICS) + 3
    assert "unfinished" not in files


class Breaks:
    """A metric that fails after some calls, as a machine may."""

    def __init__(self, calls: int, identity: str | None = None) -> None:
        self.left = calls
        self.identity = identity
        self.seen: list[int] = []

    def __call__(self, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        self.seen.append(len(offsets) - 1)
        return np.diff(offsets) * 2.5


def test_an_analysis_is_taken_up_where_it_was_left(corpus: IndexedDataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shard_tokens": 400, "batch_tokens": 1 << 20}
    options["total_functions"] = {"thirds": lambda tokens, offsets: np.array([len(tokens), tokens.sum()]) / 3}
    whole = DataAnalyzer(corpus, ["seqlen"], tmp_path / "w", metric_functions={"m": Breaks(99)}, **options).run()
    broken = Breaks(12)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        DataAnalyzer(corpus, ["seqlen"], tmp_path / "a", metric_functions={"m": broken}, **options).run()
    assert (tmp_path / "a" / "unfinished" / "state.json").is_file()
    again = Breaks(99)
    seen: list[tuple[str, int, int]] = []
    analysis = DataAnalyzer(
        corpus, ["seqlen"], tmp_path / "a", metric_functions={"m": again}, progress=lambda *f: seen.append(f), **options
    ).run(resume=True)
    assert sum(again.seen[1:]) < 500  # without the probe
    assert sum(again.seen[1:]) + sum(broken.seen[1:]) >= 500
    assert seen[-1] == ("reading", 500, 500)
    assert (analysis.values("m") == whole.values("m")).all()
    assert (analysis.total("thirds") == whole.total("thirds")).all()  # to the bit: shards add up in their order
    assert analysis.total("thirds") == pytest.approx([corpus.num_tokens / 3, corpus.tokens.sum() / 3])
    assert analysis.num_tokens == whole.num_tokens
    assert not (tmp_path / "a" / "unfinished").exists()


def test_what_was_left_of_something_else_is_not_taken_up(corpus: IndexedDataset, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        DataAnalyzer(corpus, [], tmp_path / "a", metric_functions={"m": Breaks(5)}, shard_tokens=400).run()
    with pytest.raises(ValueError, match=r"measured shards that do not fit: of other samples, metrics or models"):
        DataAnalyzer(corpus, ["seqlen"], tmp_path / "a").run(resume=True)
    with pytest.raises(ValueError, match=r"cut off; say resume .* to go on with it; say overwrite"):
        DataAnalyzer(corpus, ["seqlen"], tmp_path / "a").run()
    other = DataAnalyzer(corpus, ["seqlen"], tmp_path / "a").run(overwrite=True)
    assert other.values("seqlen").tolist() == corpus.lengths.tolist()
    for damage in (b"", b"{", b'{"key": 3}'):
        with pytest.raises(RuntimeError):
            DataAnalyzer(corpus, [], tmp_path / "b", metric_functions={"m": Breaks(5)}, shard_tokens=400).run(
                overwrite=True
            )
        (tmp_path / "b" / "unfinished" / "state.json").write_bytes(damage)
        last = Breaks(99)
        DataAnalyzer(corpus, [], tmp_path / "b", metric_functions={"m": last}, shard_tokens=400).run(resume=True)
        assert sum(last.seen[1:]) == 500


def test_values_of_two_functions_of_one_name_are_not_mixed(corpus: IndexedDataset, tmp_path: Path) -> None:
    """As the losses of two models, or of two checkpoints of one run."""
    options: dict[str, Any] = {"shard_tokens": 400}
    first, second = Breaks(5, "model 1"), Breaks(99, "model 2")
    with pytest.raises(RuntimeError):
        DataAnalyzer(corpus, [], tmp_path / "a", metric_functions={"loss": first}, **options).run()
    for other in (second, lambda tokens, offsets: np.diff(offsets) * 2.5):
        with pytest.raises(ValueError, match="shards that do not fit"):
            DataAnalyzer(corpus, [], tmp_path / "a", metric_functions={"loss": other}, **options).run(resume=True)
    again = Breaks(99, "model 1")
    DataAnalyzer(corpus, [], tmp_path / "a", metric_functions={"loss": again}, **options).run(resume=True)
    assert sum(first.seen[1:]) + sum(again.seen[1:]) == 500


def test_one_process_at_a_time_writes_an_analysis(corpus: IndexedDataset, tmp_path: Path) -> None:
    def measures(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        with pytest.raises(TimeoutError, match=rf"process {os.getpid()} on .* is writing the analysis .*a; wait"):
            DataAnalyzer(corpus, ["seqlen"], tmp_path / "a").run(resume=True)
        with pytest.raises(TimeoutError, match="is writing the analysis"):
            store_analysis(tmp_path / "a", {"m": [1]})
        return np.diff(offsets)

    whole = DataAnalyzer(corpus, [], tmp_path / "a", metric_functions={"m": measures}).run()
    assert whole.values("m").tolist() == corpus.lengths.tolist()
    with pytest.raises(ValueError, match="there is a finished analysis already; say overwrite"):
        DataAnalyzer(corpus, ["seqlen"], tmp_path / "a").run()


@pytest.mark.parametrize("moved", [None, 0, 2, 3])
def test_a_process_that_ends_while_it_seals_has_nothing_to_measure_again(
    corpus: IndexedDataset, tmp_path: Path, moved: int | None
) -> None:
    """Killed while the files are hashed (None), or after some of the three were moved, all but the manifest."""
    store_analysis(tmp_path / "a", {"before": [1, 2]})
    first, again = Breaks(99), Breaks(99)
    left = [moved or 0]
    replace = Path.replace

    def ends(self: Path, target: Path) -> Path:
        if self.parent.name == "unfinished" and Path(target).parent.name == "a":
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return replace(self, target)

    def hashes(*arguments: Any, **facts: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", ends)
        if moved is None:
            patch.setattr(analysis_module, "write_manifest", hashes)
        with pytest.raises(KeyboardInterrupt):
            DataAnalyzer(corpus, [], tmp_path / "a", metric_functions={"m": first}).run(overwrite=True)
    found = DataAnalyzer(corpus, [], tmp_path / "a", metric_functions={"m": again}).run(resume=True)
    assert len(again.seen) == 1  # the probe
    assert Analysis.load(tmp_path / "a").values("m").tolist() == (corpus.lengths * 2.5).tolist()
    assert found.order("m").tolist() == np.argsort(corpus.lengths, kind="stable").tolist()
    assert not (tmp_path / "a" / "unfinished").exists()


def test_a_full_disk_is_told_before_it_is_written_to(
    corpus: IndexedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a map it would be SIGBUS."""

    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: it takes 4,128 bytes, and [\d,]+ are free") as raised:
        DataAnalyzer(corpus, ["seqlen"], tmp_path / "a").run()
    assert raised.value.errno == errno.ENOSPC
    assert not (tmp_path / "a").exists()


def test_a_process_that_ends_while_it_saves_leaves_what_it_saved_before(tmp_path: Path) -> None:
    """The counts are in one file and the list of the shards that they hold in another: they must go together."""
    bounds, dtypes = [0, 2, 4, 6], {"m": np.dtype(np.int64)}

    def shard(store: Unfinished, number: int) -> None:
        store.tokens = (store.tokens or 0) + 10
        store.counts = np.array([store.tokens])
        store.store(0, number, {"m": np.array([number, number])})

    store = Unfinished(tmp_path, "k", bounds, dtypes, 1, resume=False)
    for number in range(2):
        shard(store, number)
        store.save()
    shard(store, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfinished, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.save()
    again = Unfinished(tmp_path, "k", bounds, dtypes, 1, resume=True)
    assert again.missing(0) == [2]
    assert (again.tokens, again.counts.tolist()) == (20, [20])
    shard(again, 2)
    again.save()
    last = Unfinished(tmp_path, "k", bounds, dtypes, 1, resume=True)
    assert (last.missing(0), last.tokens, last.counts.tolist()) == ([], 30, [30])
    assert last.values("m").tolist() == [0, 0, 1, 1, 2, 2]


def test_a_metric_keeps_its_type(corpus: IndexedDataset, tmp_path: Path) -> None:
    def wavers(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        return np.diff(offsets) if len(offsets) < 10 else np.diff(offsets) / 2

    with pytest.raises(ValueError, match="whole numbers for the first samples but float64"):
        DataAnalyzer(corpus, [], tmp_path / "a", metric_functions={"m": wavers}).run()


def test_an_analysis_knows_its_dataset(corpus: IndexedDataset, tmp_path: Path) -> None:
    DataAnalyzer(corpus, ["seqlen"], tmp_path / "a").run()
    analysis = Analysis.load(tmp_path / "a")
    analysis.check_dataset(corpus)
    analysis.check_dataset([row.tolist() for row in corpus])
    analysis.check_dataset([{"input_ids": row} for row in corpus])
    with pytest.raises(ValueError, match="of 500 samples, but the dataset has 499"):
        analysis.check_dataset(corpus[:499])
    with pytest.raises(ValueError, match="of other tokens"):
        analysis.check_dataset([row + 1 for row in corpus])
    windows = TokenWindows(corpus, 7)
    of_windows = DataAnalyzer(windows, ["seqlen"], tmp_path / "w").run()
    of_windows.check_dataset(TokenWindows(corpus, 7))
    with pytest.raises(ValueError, match="for windows, with the same length"):
        of_windows.check_dataset(TokenWindows(corpus, 8))


def test_batches_of_columns_count_samples(tmp_path: Path) -> None:
    class Columns:
        """Batches come as a dictionary of columns, as Hugging Face datasets give them."""

        def __len__(self) -> int:
            return 300

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": [index] * (index % 3), "label": index}

        def __getitems__(self, indices: list[int]) -> dict[str, Any]:
            rows = [self[index] for index in indices]
            return {"input_ids": [row["input_ids"] for row in rows], "label": indices}

    class Pairs(Columns):
        def __getitems__(self, indices: list[int]) -> list[tuple[np.ndarray, int]]:  # type: ignore[override]
            return [(np.array([index] * (index % 3), dtype=np.int64), index) for index in indices]

        def __getitem__(self, index: int) -> Any:
            return self.__getitems__([index])[0]

    class Inputs(Columns):
        """An input dictionary and labels, as packed rows are."""

        __getitems__ = None  # type: ignore[assignment]

        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index), index

    for dataset in (Columns(), Pairs(), Inputs()):
        analysis = DataAnalyzer(dataset, ["seqlen"], tmp_path / type(dataset).__name__, shard_tokens=2560).run()
        assert analysis.values("seqlen").tolist() == [index % 3 for index in range(300)]


_ON_RAY = """
import json, sys
from penstock.data_pipeline.data_sampling import DataAnalyzer, IndexedDataset
import numpy as np
if __name__ == "__main__":
    corpus = IndexedDataset(sys.argv[1])
    double = lambda tokens, offsets: np.diff(offsets) * 2
    thirds = lambda tokens, offsets: np.bincount(tokens, minlength=400) / 3
    analyzer = DataAnalyzer(
        corpus, ["seqlen", "vocabularyrarity"], sys.argv[2], metric_functions={"double": double}, engine="ray",
        total_functions={"thirds": thirds}, shard_tokens=1500,
    )
    found = analyzer.run()
    print(json.dumps([found.num_tokens, found.values("double").tolist()]))
    try:
        DataAnalyzer([[1], [-1]], output_dir=sys.argv[2] + "x", engine="ray").run()
    except ValueError as error:
        print(error)
"""


def test_the_same_on_a_local_ray(corpus: IndexedDataset, tmp_path: Path) -> None:
    thirds = {"thirds": lambda tokens, offsets: np.bincount(tokens, minlength=400) / 3}
    native = DataAnalyzer(corpus, output_dir=tmp_path / "native", total_functions=thirds, shard_tokens=1500).run()
    script = tmp_path / "on_ray.py"
    script.write_text(_ON_RAY)
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "corpus"), str(tmp_path / "ray")],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    tokens, double = json.loads(result.stdout.splitlines()[0])
    assert tokens == native.num_tokens
    assert double == (2 * corpus.lengths).tolist()
    assert "token numbers run from -1" in result.stdout
    files = [f"{metric}.{kind}" for metric in native.metrics for kind in ("values", "order")]
    for name in [f"{file}.npy" for file in (*files, "thirds.total", "token_counts")]:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "native" / name).read_bytes()
