import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import TensorDataset

from penstock._core.files import CorruptFileError
from penstock.data_pipeline.datasets import IndexedDataset, IndexedDatasetBuilder, TokenWindows, open_dataset
from penstock.data_pipeline.datasets.tables import TableColumn, read_table

ROWS = [[1, 2, 3], [], [4], [5, 6], [7, 8, 9, 10]]


def _write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path, compression="uncompressed", chunksize=2)
    elif path.name == "stream.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.arrow", "stream.arrow", "a.jsonl"])
def test_rows_of_tokens_from_every_format(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, pa.table({"id": list(range(5)), "tokens": ROWS}))
    dataset = open_dataset(path)
    assert isinstance(dataset, TableColumn)
    assert dataset.column == "tokens"
    assert [row.tolist() for row in dataset] == ROWS
    assert dataset[-1].tolist() == ROWS[-1]
    assert dataset.lengths.tolist() == [len(row) for row in ROWS]
    assert open_dataset(path, column="id")[3] == 3


def test_rows_are_views_that_cannot_be_written_to() -> None:
    dataset = TableColumn(pa.table({"tokens": ROWS}))
    assert np.shares_memory(dataset[0], dataset[0])
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 9


def test_a_sliced_table_is_read_where_it_starts() -> None:
    dataset = TableColumn(pa.table({"tokens": ROWS}).slice(2, 2))
    assert [row.tolist() for row in dataset] == ROWS[2:4]
    assert dataset.lengths.tolist() == [1, 2]


def test_text_and_data_frames() -> None:
    assert list(TableColumn(pa.table({"text": ["a", "b"], "n": [1, 2]}))) == ["a", "b"]
    frame = pd.DataFrame({"input_ids": [[1, 2], [3]], "n": [0, 0]})
    assert [row.tolist() for row in open_dataset(frame)] == [[1, 2], [3]]
    assert [row.tolist() for row in open_dataset(pa.table({"x": [[1], [2]]}))] == [[1], [2]]


def test_an_empty_table_is_an_empty_dataset() -> None:
    dataset = TableColumn(pa.table({"tokens": pa.array([], pa.list_(pa.int32()))}))
    assert len(dataset) == 0
    assert dataset.lengths.tolist() == []


@pytest.mark.parametrize(
    ("table", "column", "sentence"),
    [
        ({"a": [1], "b": [2]}, None, "which column.*a, b"),
        ({"input_ids": [[1]]}, "input_id", "did you mean 'input_ids'"),
        ({"tokens": [[1], None]}, None, "1 missing values"),
        ({"tokens": [[1, None]]}, None, "1 missing numbers"),
        ({"tokens": [["a"]]}, None, "lists of string"),
        ({"tokens": [{"a": 1}]}, None, "holds struct"),
    ],
)
def test_unclear_columns_are_refused(table: dict[str, list[object]], column: str | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TableColumn(pa.table(table), column)


def test_numbers_have_no_lengths_and_rows_end() -> None:
    dataset = TableColumn(pa.table({"n": [1, 2]}))
    with pytest.raises(ValueError, match="no lists"):
        _ = dataset.lengths
    with pytest.raises(IndexError, match="row 2"):
        dataset[2]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.parquet", b"junk", "not a readable .parquet"),
        ("a.arrow", b"junk", "not a readable .arrow"),
        ("a.jsonl", b"[1, 2]", "line 1: expected an object"),
        ("a.jsonl", b'{"tokens": [1]}\n{"tokens": "x"}', "not a readable .jsonl"),
        ("a.npy", b"junk", "not a readable array"),
        ("a.csv", b"a,b", "not a known kind of dataset. understood: .*parquet"),
        ("a.txt", b"text", "penstock tokenize"),
        ("a.idx", b"junk", "a.bin"),
    ],
)
def test_broken_or_unknown_files_are_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        open_dataset(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_opening_indexed_files_arrays_and_objects(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "c", np.uint16) as builder:
        builder.add_document(np.arange(10))
    for path in (tmp_path / "c", tmp_path / "c.bin", str(tmp_path / "c.idx")):
        assert isinstance(open_dataset(path), IndexedDataset)
    windows = open_dataset(tmp_path / "c", length=4, stride=2)
    assert isinstance(windows, TokenWindows)
    assert windows[1].tolist() == [2, 3, 4, 5, 6]
    assert open_dataset(windows) is windows
    assert open_dataset(windows, length=4, stride=2) is windows
    np.save(tmp_path / "a.npy", np.arange(9))
    assert open_dataset(tmp_path / "a.npy").tolist() == list(range(9))
    assert len(open_dataset(tmp_path / "a.npy", length=4)) == 2
    tensors = TensorDataset(torch.zeros(3))
    assert open_dataset(tensors) is tensors
    assert open_dataset([1, 2]) == [1, 2]


def test_other_mistakes_in_opening(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file, nor"):
        open_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match="a directory"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        read_table(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"type int is not a dataset. understood"):
        open_dataset(3)
    with pytest.raises(ValueError, match="not a stream"):
        open_dataset([[1, 2]], length=4)
    with pytest.raises(ValueError, match="no length"):
        open_dataset([[1, 2]], stride=4)
    with pytest.raises(ValueError, match="not a table"):
        open_dataset([[1, 2]], column="x")
    with pytest.raises(ValueError, match="cut already"):
        open_dataset(TokenWindows(np.arange(10), 4), length=5)
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"o.npy"):
        open_dataset(tmp_path / "o.npy")


def test_a_hugging_face_dataset_on_disk_and_as_an_object(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [[n] * (n % 4) for n in range(20)]
    saved = datasets.Dataset.from_dict({"input_ids": rows, "label": list(range(20))})
    saved.save_to_disk(tmp_path / "hf", num_shards=3)
    from_disk = open_dataset(tmp_path / "hf")
    assert [row.tolist() for row in from_disk] == rows
    assert open_dataset(tmp_path / "hf", column="label")[7] == 7
    shuffled = saved.select([5, 2, 9])
    assert [row.tolist() for row in open_dataset(shuffled, column="input_ids")] == [rows[5], rows[2], rows[9]]
    assert open_dataset(saved) is saved
    (tmp_path / "hf" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(CorruptFileError, match="lists no files of data"):
        open_dataset(tmp_path / "hf")
