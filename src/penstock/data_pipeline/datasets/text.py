"""Documents of text from files: JSON lines, plain text, Parquet, or a directory of them, one at a time.

Everything streams: a file of any size is read in bounded memory, except that one document is held whole.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, Literal, get_args

from penstock._core.files import CorruptFileError
from penstock._core.suggest import unknown_name
from penstock.data_pipeline.datasets.remote import fetch, is_remote

Split = Literal["file", "paragraph", "line"]

JSON_LINES: Final = (".jsonl", ".ndjson")
PLAIN: Final = (".txt", ".text", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".tex")
PARQUET: Final = (".parquet",)
COMPRESSED: Final = (".gz", ".zst")

# What is taken of a table at once: rows, but fewer where they are long.
_TABLE_ROWS: Final = 4096
_TABLE_BYTES: Final = 1 << 24

_KNOWN: Final = (*JSON_LINES, *PLAIN, *PARQUET)
_SUFFIXES: Final = f"known suffixes: {', '.join(_KNOWN)} (all but Parquet also with {' or '.join(COMPRESSED)})"
_CHOOSE: Final = "choose it with field (--field on the command line)"


def kind_of(path: str | os.PathLike[str]) -> str:
    """A file's suffix in lower case, seen through compression: ``corpus.jsonl.gz`` is ``.jsonl``."""
    file = Path(path)
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED else suffix


def text_files(path: str | os.PathLike[str]) -> list[Path]:
    """The text files that ``path`` stands for: itself, or those below a directory, sorted by path; or a remote file.

    Raises:
        ValueError: There is nothing at ``path``, its kind is not known, or the directory holds no text file.
    """
    top = fetch(os.fspath(path)) if is_remote(path) else Path(path)
    if top.is_dir():
        files = sorted(file for file in top.rglob("*") if kind_of(file) in _KNOWN and file.is_file())
        if not files:
            raise ValueError(f"{top}: no text file below this directory; {_SUFFIXES}")
        return files
    if not top.exists():
        raise ValueError(f"{top}: there is no such file or directory")
    if kind_of(top) not in _KNOWN:
        raise ValueError(f"{top}: not a known kind of text file; {_SUFFIXES}")
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
    check_split(split)
    files = text_files(path)
    return (text for file in files for text in TextFile(file, field, split) if text.strip())


def check_split(split: str) -> None:
    """Refuse a way of splitting that is not known."""
    if split not in get_args(Split):
        raise ValueError(unknown_name("split", str(split), get_args(Split)))


class TextFile:
    """One file's documents, blank ones too, in order; iterate once.

    Args:
        path: The file.
        field: Where the text is in a JSON object or a Parquet table.
        split: What is one document of a plain text file.

    Attributes:
        size: Of the file, in bytes as it lies there.
    """

    def __init__(self, path: Path, field: str = "text", split: Split = "file") -> None:
        self.path = path
        self.size = path.stat().st_size
        self._field, self._split = field, split
        self._raw: IO[bytes] | None = None
        self._share = 0.0

    @property
    def position(self) -> int:
        """How many of the bytes have been read, as near as can be said."""
        if self._raw is not None and not self._raw.closed:
            return self._raw.tell()
        return round(self._share * self.size)

    def __iter__(self) -> Iterator[str]:
        kind = kind_of(self.path)
        if kind in PARQUET:
            yield from self._parquet()
        else:
            with self.path.open("rb") as self._raw:
                yield from (
                    self._json_lines(self._raw) if kind in JSON_LINES else _plain(self.path, self._raw, self._split)
                )
        self._share = 1.0

    def check(self) -> None:
        """Look for the field where that costs next to nothing: in the first line, or the table's schema.

        Raises:
            ValueError: It is not there, or holds no text; or the file is not what its name says.
        """
        kind = kind_of(self.path)
        if kind in JSON_LINES:
            for _ in self:
                break
        elif kind in PARQUET:
            with self._open_parquet():
                pass

    def _json_lines(self, raw: IO[bytes]) -> Iterator[str]:
        for number, value in json_lines(self.path, raw):
            if isinstance(value, dict):
                if self._field not in value:
                    unknown = unknown_name("field", self._field, map(str, value))
                    raise ValueError(f"{self.path}, line {number}: {unknown}; {_CHOOSE}")
                value = value[self._field]
            if not isinstance(value, str):
                found = type(value).__name__
                raise ValueError(f"{self.path}, line {number}: expected text in {self._field!r}, found {found}")
            yield value

    def _parquet(self) -> Iterator[str]:
        with self._open_parquet() as table:
            facts = table.metadata
            seen, rows = 0, max(1, facts.num_rows)
            stored = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
            at_once = max(1, min(_TABLE_ROWS, rows * _TABLE_BYTES // max(1, stored)))
            for batch in table.iter_batches(at_once, columns=[self._field], use_threads=False):
                for value in batch.column(0):
                    text = value.as_py()
                    if text is not None:
                        yield text
                seen += len(batch)
                self._share = seen / rows

    @contextmanager
    def _open_parquet(self) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(self.path)
        except pa.ArrowInvalid as error:
            raise CorruptFileError(f"{self.path}: not a readable Parquet file ({error})") from None
        with table:
            names = table.schema_arrow.names
            if self._field not in names:
                raise ValueError(f"{self.path}: {unknown_name('column', self._field, names)}; {_CHOOSE}")
            kind = table.schema_arrow.field(self._field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"{self.path}: column {self._field!r} holds {kind}, not text")
            yield table


def json_lines(file: Path, raw: IO[bytes]) -> Iterator[tuple[int, object]]:
    """Yield ``(line number from 1, value)`` for each line of a JSON-lines file that is not blank.

    Args:
        file: What to call it in messages; its suffix says how it is compressed.
        raw: The open file.
    """
    number = 0
    with _decoding(file, raw, lambda: f", after line {number}") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise CorruptFileError(f"{file}, line {number}: not valid JSON ({error})") from None
                yield number, value


@contextmanager
def _decoding(file: Path, raw: IO[bytes], place: Callable[[], str] = str) -> Iterator[IO[str]]:
    """An open file as UTF-8 text, through its compression; a byte-order mark is dropped.

    Raises:
        CorruptFileError: It is broken; the message names the file, and the ``place`` as it is then.
    """
    suffix = file.suffix.lower()
    binary: Any = raw
    if suffix == ".gz":
        binary = gzip.GzipFile(fileobj=raw)
    elif suffix == ".zst":
        import pyarrow as pa

        binary = pa.CompressedInputStream(binary, "zstd")
    try:
        # Every byte counts: without newline, carriage returns would be changed.
        with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{file}{place()}: not UTF-8 text ({error})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptFileError(f"{file}{place()}: the compressed file is cut short or broken ({error})") from None
    except OSError as error:
        if suffix != ".zst" or error.errno is not None:
            raise
        # pyarrow's way to say it; a disk's error has a number
        raise CorruptFileError(f"{file}{place()}: the compressed file is cut short or broken ({error})") from None


def _plain(file: Path, raw: IO[bytes], split: Split) -> Iterator[str]:
    with _decoding(file, raw) as lines:
        if split == "file":
            yield lines.read()
        elif split == "line":
            for line in lines:
                yield line.removesuffix("\n").removesuffix("\r")
        else:
            yield from _paragraphs(lines)


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
