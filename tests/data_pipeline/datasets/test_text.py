import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.data_pipeline.datasets import read_texts, text_files


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def test_json_lines_of_objects_and_of_strings(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "id": 1}\n\n"two"\n{"text": "  "}\n{"text": "thr\\u00e9\\u00e9"}\n')
    assert list(read_texts(file)) == ["one", "two", "thréé"]
    file.write_text('{"body": "b", "text": "t"}\n')
    assert list(read_texts(file, field="body")) == ["b"]


def test_plain_text_whole_by_paragraph_and_by_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\nt\rwo\n \r\n\n\nthree\n")
    assert list(read_texts(file)) == ["one\r\nt\rwo\n \r\n\n\nthree\n"]  # every byte but the mark
    assert list(read_texts(file, split="paragraph")) == ["one\r\nt\rwo\n", "three\n"]
    assert list(read_texts(file, split="line")) == ["one", "t\rwo", "three"]


def test_compressed_and_columnar(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n')
    assert list(read_texts(tmp_path / "a.jsonl.gz")) == ["packed"]
    (tmp_path / "a.txt.zst").write_bytes(zstd("\ufeffone\n".encode()) + zstd(b"two\n"))  # two frames, as pzstd writes
    assert list(read_texts(tmp_path / "a.txt.zst", split="line")) == ["one", "two"]
    pq.write_table(pa.table({"text": ["x", None, "", "y"], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.parquet")) == ["x", "y"]


def test_a_directory_is_read_in_path_order_and_only_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a2.jsonl").write_text(json.dumps("second"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(read_texts(tmp_path)) == ["first", "second", "third"]
    assert [file.name for file in text_files(tmp_path)] == ["a.txt", "a2.jsonl", "1.txt"]


def test_reading_streams(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"good"\n{broken\n')
    texts = read_texts(tmp_path / "a.jsonl")
    assert next(texts) == "good"
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        next(texts)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"txt": "x"}', "line 1: unknown field 'text'; did you mean 'txt'"),
        ("a.jsonl", b'"x"\n{"text": 3}', "line 2: expected text in 'text', found int"),
        ("a.jsonl", b"\n[1]", "line 2: expected text in 'text', found list"),
        ("a.jsonl", b"\xff\xff", "not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.txt", b"\xff\xff", "not UTF-8"),
        ("a.txt.gz", b"not gzip", "cut short or broken"),
        ("a.jsonl.gz", gzip.compress(b'"x"' * 1000, mtime=0)[:-9], "cut short or broken"),
        ("a.txt.zst", b"not zstd", "cut short or broken"),
        ("a.jsonl.zst", zstd(b'"x"' * 1000)[:-5], "cut short or broken"),
        ("a.parquet", b"nothing", "not a readable Parquet file"),
        ("a.docx", b"", "not a known kind of text file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        list(read_texts(tmp_path / name))
    assert name in str(caught.value)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="no text file below"):
        read_texts(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="did you mean 'line'"):
        read_texts(tmp_path / "a.txt", split="lines")  # type: ignore[arg-type]
    pq.write_table(pa.table({"texts": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="did you mean 'texts'"):
        list(read_texts(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="holds int64, not text"):
        list(read_texts(tmp_path / "a.parquet", field="n"))
