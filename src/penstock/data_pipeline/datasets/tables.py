"""One column of a Parquet, Arrow or JSON-lines table as a map-style dataset."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from penstock._core.files import CorruptFileError, read_json
from penstock._core.suggest import unknown_name
from penstock.data_pipeline.datasets.text import json_lines, kind_of

USUAL_COLUMNS: Final = ("input_ids", "tokens", "token_ids", "text")
"""Columns looked for, in this order, when none is named."""

TABLE_SUFFIXES: Final = (".parquet", ".arrow", ".feather", ".jsonl", ".ndjson")


class TableColumn:
    """A column of token lists, texts or numbers; ``dataset[i]`` is row ``i``.

    A row of a list column is a read-only array (a view of the column, not a copy); of a text column a ``str``; of a
    number column a Python number.

    Args:
        table: A ``pyarrow.Table``.
        column: Which column. If None: the first of ``input_ids``, ``tokens``, ``token_ids``, ``text`` that it has, or
            the only one.
        source: What to call the table in messages.

    Raises:
        ValueError: The column is not there or not clear, has missing values, or holds something else.
    """

    def __init__(self, table: pa.Table, column: str | None = None, *, source: str = "the table") -> None:
        self.column = _choose(table.column_names, column, source)
        self.source = source
        data = table.column(self.column)
        if data.null_count:
            raise ValueError(f"{source}: column {self.column!r} has {data.null_count} missing values; drop those rows")
        self.is_tokens = pa.types.is_list(data.type) or pa.types.is_large_list(data.type)
        if self.is_tokens:
            inner = data.type.value_type
            if not (pa.types.is_integer(inner) or pa.types.is_floating(inner)):
                raise ValueError(f"{source}: column {self.column!r} holds lists of {inner}, not of numbers")
        elif not _is_scalar(data.type):
            raise ValueError(
                f"{source}: column {self.column!r} holds {data.type}; known: lists of numbers, text, numbers"
            )
        self._chunks = [chunk for chunk in data.chunks if len(chunk)]
        self._flat = [_flat_values(chunk, source, self.column) for chunk in self._chunks] if self.is_tokens else []
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {self.source}, which has {len(self)}")
        row = int(index) % len(self)
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        row -= int(self._starts[chunk])
        if self.is_tokens:
            values, offsets = self._flat[chunk]
            return values[offsets[row] : offsets[row + 1]]
        return self._chunks[chunk][row].as_py()

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def streams(self) -> Iterator[npt.NDArray[Any]]:
        """The numbers of all rows of a list column end to end, in read-only pieces as they lie in memory.

        Raises:
            ValueError: It is not a list column.
        """
        self._check_lists()
        return (values[offsets[0] : offsets[-1]] for values, offsets in self._flat)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Numbers in each row of a list column, int64.

        Raises:
            ValueError: It is not a list column.
        """
        self._check_lists()
        parts = [np.diff(offsets) for _, offsets in self._flat]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def _check_lists(self) -> None:
        if not self.is_tokens:
            raise ValueError(f"{self.source}: column {self.column!r} holds no lists, so its rows have no length")

    def __repr__(self) -> str:
        return f"TableColumn({self.source}, column {self.column!r}, {len(self)} rows)"


def read_table(path: str | os.PathLike[str], column: str | None = None) -> TableColumn:
    """Open a table file; Arrow files are memory-mapped, of a Parquet file only the column is read.

    Args:
        path: ``.parquet``, ``.arrow`` or ``.feather``, JSON lines (one object a line), or a directory that Hugging
            Face's ``save_to_disk`` wrote of a dataset.
        column: See :class:`TableColumn`.

    Raises:
        ValueError: The file is missing, malformed or of another kind, or the column is not clear.
    """
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{file}: there is no such file")
    kind = kind_of(file)
    try:
        if file.is_dir():
            table = _read_saved(file)
        elif kind == ".parquet":
            table = _read_parquet(file, column)
        elif kind in (".arrow", ".feather"):
            table = _read_arrow(file)
        elif kind in (".jsonl", ".ndjson"):
            table = _read_json_lines(file)
        else:
            raise ValueError(f"{file}: not a known kind of table; known suffixes: {', '.join(TABLE_SUFFIXES)}")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError) as error:
        raise CorruptFileError(f"{file}: not a readable {kind} table ({error})") from None
    return TableColumn(table, column, source=str(file))


def _read_parquet(file: Path, column: str | None) -> pa.Table:
    names = pq.read_schema(file).names
    return pq.read_table(file, columns=[_choose(names, column, str(file))])


def _read_arrow(file: Path) -> pa.Table:
    data = pa.memory_map(str(file))
    try:
        return pa.ipc.open_file(data).read_all()
    except pa.ArrowInvalid:  # a stream instead of a file, as Hugging Face datasets writes them
        data.seek(0)
        return pa.ipc.open_stream(data).read_all()


def _read_saved(folder: Path) -> pa.Table:
    """The shards that a saved Hugging Face dataset lists, mapped."""
    state = read_json(folder / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names = [str(entry.get("filename")) for entry in listed or [] if isinstance(entry, dict)]
    if not names or not all(Path(name).name == name for name in names):
        raise CorruptFileError(f"{folder / 'state.json'}: lists no files of data")
    return pa.concat_tables([_read_arrow(folder / name) for name in names])


def _read_json_lines(file: Path) -> pa.Table:
    rows: list[dict[str, Any]] = []
    with file.open("rb") as raw:
        for number, value in json_lines(file, raw):
            if not isinstance(value, dict):
                raise ValueError(f"{file}, line {number}: expected an object, found {type(value).__name__}")
            rows.append(value)
    return pa.Table.from_pylist(rows)


def _choose(names: list[str], column: str | None, source: str) -> str:
    if column is not None:
        if column not in names:
            raise ValueError(f"{source}: {unknown_name('column', column, names)}")
        return column
    for usual in USUAL_COLUMNS:
        if usual in names:
            return usual
    if len(names) == 1:
        return names[0]
    raise ValueError(
        f"{source}: which column? It has {', '.join(names) or 'none'}; name one (looked for {', '.join(USUAL_COLUMNS)})"
    )


def _is_scalar(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_floating)
    return any(test(kind) for test in tests)


def _flat_values(chunk: Any, source: str, column: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """A list chunk's numbers, flat, and where each row starts in them."""
    offsets = chunk.offsets.to_numpy().astype(np.int64)
    values = chunk.values
    if values.null_count:
        raise ValueError(f"{source}: column {column!r} has {values.null_count} missing numbers inside its lists")
    flat = values.to_numpy(zero_copy_only=True)
    flat.flags.writeable = False
    return flat, offsets
