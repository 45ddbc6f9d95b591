import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.data_pipeline.datasets import (
    IndexedDataset,
    IndexedDatasetBuilder,
    TokenWindows,
    open_dataset,
    read_texts,
)
from penstock.data_pipeline.datasets.remote import CACHE_VARIABLE, fetch, is_remote


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def build(prefix: Path, tokens: list[int]) -> None:
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        builder.add_document(tokens)


def test_an_indexed_dataset_elsewhere(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    build(tmp_path / "v1.0", [1, 2, 3, 4, 5])
    for suffix in (".bin", ".idx"):
        memory.pipe(f"/bucket/v1.0{suffix}", Path(f"{tmp_path}/v1.0{suffix}").read_bytes())
    for name in ("memory://bucket/v1.0", "memory://bucket/v1.0.idx"):
        assert IndexedDataset(name)[0].tolist() == [1, 2, 3, 4, 5]
        assert isinstance(open_dataset(name), IndexedDataset)
    assert isinstance(open_dataset("memory://bucket/v1.0", length=2), TokenWindows)


def test_a_copy_is_used_until_the_original_changes(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/a/x.jsonl", b'"one"\n')
    copy = fetch("memory://a/x.jsonl")
    stamp = copy.stat().st_mtime_ns
    assert fetch("memory://a/x.jsonl").stat().st_mtime_ns == stamp
    assert list(read_texts("memory://a/x.jsonl")) == ["one"]
    memory.pipe("/a/x.jsonl", b'"two, longer"\n')
    assert list(read_texts("memory://a/x.jsonl")) == ["two, longer"]
    memory.pipe("/b/x.jsonl", b'"another of that name"\n')
    assert list(read_texts("memory://b/x.jsonl")) == ["another of that name"]


def test_a_copy_that_was_cut_short_is_refused(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory.pipe("/a/x.jsonl", b'"one"\n"two"\n')
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", lambda self, path, aside: Path(aside).write_bytes(b'"one"\n'))
        with pytest.raises(ValueError, match="6 bytes came, but the file has 12"):
            fetch("memory://a/x.jsonl")
    assert list(read_texts("memory://a/x.jsonl")) == ["one", "two"]
    names = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(names) == ["x.jsonl", "x.jsonl.origin"]


def test_tables_elsewhere(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1, 2], [3]], "other": [[7], [8]]}), tmp_path / "t.parquet")
    memory.pipe("/t.parquet", (tmp_path / "t.parquet").read_bytes())
    memory.pipe("/t.jsonl", json.dumps({"tokens": [4, 5]}).encode())
    assert open_dataset("memory://t.parquet")[0].tolist() == [1, 2]
    assert open_dataset("memory://t.parquet", column="other")[1].tolist() == [8]
    assert open_dataset("memory://t.jsonl")[0].tolist() == [4, 5]
    assert open_dataset(f"file://{tmp_path}/t.parquet")[1].tolist() == [3]


def test_what_cannot_be_fetched(memory: fsspec.AbstractFileSystem) -> None:
    assert not is_remote("C:/x")
    assert not is_remote(Path("/a/b"))
    for name, message in (
        ("memory://nowhere/x.parquet", "there is no such file"),
        ("memory://nowhere/x.bin", r"x\.bin: there is no such file"),
        ("nosuchkind://bucket/x", "nosuchkind"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(name)
