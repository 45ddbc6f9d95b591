"""Documents of text from files: JSON lines, plain text, Parquet, or a directory of them, one at a time.

Everything streams: a file of any size is read in bounded memory, except that one document is held whole.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Literal

from penstock._core.suggest import unknown_name
from penstock.data_pipeline.datasets.remote import fetch, is_remote

Split = Literal["file", "paragraph", "line"]

JSON_LINES: Final = (".jsonl", ".ndjson")
PLAIN: Final = (".txt", ".text", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".tex")
PARQUET: Final = (".parquet",)

_CHOOSE: Final = "choose it with field (--field on the command line)"


def kind_of(path: str | os.PathLike[str]) -> str:
    """A file's suffix in lower case, seen through ``.gz``: ``corpus.jsonl.gz`` is ``.jsonl``."""
    file = Path(path)
    return Path(file.stem).suffix.lower() if file.suffix.lower() == ".gz" else file.suffix.lower()


def text_files(path: str | os.PathLike[str]) -> list[Path]:
    """The text files that ``path`` stands for: itself, or those below a directory, sorted by path; or a remote file.

    Raises:
        ValueError: There is nothing at ``path``, its kind is not known, or the directory holds no text file.
    """
    top = fetch(os.fspath(path)) if is_remote(path) else Path(path)
    known = (*JSON_LINES, *PLAIN, *PARQUET)
    if top.is_dir():
        files = sorted(file for file in top.rglob("*") if kind_of(file) in known and file.is_file())
        if not files:
            raise ValueError(f"{top}: no text file below this directory; known suffixes: {', '.join(known)} (or .gz)")
        return files
    if not top.exists():
        raise ValueError(f"{top}: there is no such file or directory")
    if kind_of(top) not in known:
        raise ValueError(f"{top}: not a known kind of text file; known suffixes: {', '.join(known)} (or .gz)")
    return [top]


def read_texts(path: str | os.PathLike[str], *, field: str = "text", split: Split = "file") -> Iterator[str]:
    """Yield the documents of a text file or of a directory of text files.

    Args:
        path: JSON lines (each line a string, or an object whose ``field`` is a string), Parquet (a column of strings
            named ``field``), plain UTF-8 text, any but Parquet also compressed by gzip, or a directory of these.
        field: Where the text is in a JSON object or a Parquet table.
        split: What is one document of a plain text file: the whole ``file``, a ``paragraph`` (blank lines part
            them), or a ``line``.

    Yields:
        Documents that are not blank, in file order.

    Raises:
        ValueError: A file is missing, unknown or malformed; the message names it and the line.
    """
    if split not in ("file", "paragraph", "line"):
        raise ValueError(unknown_name("split", str(split), ("file", "paragraph", "line")))
    files = text_files(path)
    return (text for file in files for text in _read_file(file, field, split) if text.strip())


def _read_file(file: Path, field: str, split: Split) -> Iterator[str]:
    kind = kind_of(file)
    if kind in JSON_LINES:
        return _read_json_lines(file, field)
    if kind in PARQUET:
        return _read_parquet(file, field)
    return _read_plain(file, split)


def open_text(file: Path) -> IO[str]:
    """Open a UTF-8 text file, through gzip where its name ends in ``.gz``; a byte-order mark is dropped."""
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _read_json_lines(file: Path, field: str) -> Iterator[str]:
    for number, value in json_lines(file):
        if isinstance(value, dict):
            if field not in value:
                raise ValueError(f"{file}, line {number}: {unknown_name('field', field, map(str, value))}; {_CHOOSE}")
            value = value[field]
        if not isinstance(value, str):
            raise ValueError(f"{file}, line {number}: expected text in {field!r}, found {type(value).__name__}")
        yield value


def json_lines(file: Path) -> Iterator[tuple[int, object]]:
    """Yield ``(line number from 1, value)`` for each line of a JSON-lines file that is not blank."""
    number = 0
    try:
        with open_text(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, after line {number}: not UTF-8 text ({error})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}, line {number}: not valid JSON ({error})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}, after line {number}: the compressed file is cut short or broken ({error})") from None


def _read_plain(file: Path, split: Split) -> Iterator[str]:
    try:
        with open_text(file) as lines:
            if split == "file":
                yield lines.read()
            elif split == "line":
                for line in lines:
                    yield line.rstrip("\n")
            else:
                yield from _paragraphs(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: the compressed file is cut short or broken ({error})") from None


def _paragraphs(lines: IO[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _read_parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from None
    with table:
        names = table.schema_arrow.names
        if field not in names:
            raise ValueError(f"{file}: {unknown_name('column', field, names)}; {_CHOOSE}")
        kind = table.schema_arrow.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{file}: column {field!r} holds {kind}, not text")
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0):
                text = value.as_py()
                if text is not None:
                    yield text
