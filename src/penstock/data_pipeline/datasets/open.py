"""One way to open whatever a user has: a path, an array, a table, or a dataset already."""

import os
from pathlib import Path
from typing import Any, Final

import numpy as np

from penstock._core.files import CorruptFileError
from penstock.data_pipeline.datasets.indexed import IndexedDataset, bin_path, idx_path
from penstock.data_pipeline.datasets.remote import fetch, fetch_pair, is_remote, remote_is_pair
from penstock.data_pipeline.datasets.text import PLAIN, kind_of
from penstock.data_pipeline.datasets.windows import TokenWindows

_UNDERSTOOD: Final = (
    "understood: the prefix of a .bin/.idx pair (or either file), .parquet, .arrow, .feather, .jsonl, .npy, or a "
    "directory by Hugging Face's save_to_disk; a numpy array, a tensor, a list, a pandas or Arrow table, or any object "
    "with __len__ and __getitem__ (or __iter__)"
)


def open_dataset(
    source: Any, *, length: int | None = None, stride: int | None = None, column: str | None = None
) -> Any:
    """Open a dataset by what is found.

    Args:
        source: A path or URL (see below) or an object. An object that has ``__getitem__`` and ``__len__``, or can be
            iterated, is a dataset already and comes back as it is, except that a pandas or Arrow table, and with
            ``column`` a Hugging Face dataset, becomes a :class:`TableColumn`.
        length: Cut the stream of tokens into windows of ``length + 1`` (:class:`TokenWindows`); for ``.bin/.idx``
            pairs and one-dimensional arrays.
        stride: Tokens between the starts of windows; ``length`` unless given.
        column: Which column of a table.

    Returns:
        ``.bin/.idx``: :class:`IndexedDataset`, or :class:`TokenWindows` over it; Parquet, Arrow, JSON lines,
        and directories by Hugging Face's ``save_to_disk``: :class:`TableColumn`; ``.npy``: a memory-mapped array.

    Raises:
        ValueError: Nothing is there, it is not understood, or an option does not apply to what was found. The message
            lists what is understood.
    """
    if stride is not None and length is None:
        raise ValueError(f"stride={stride} says where windows start, but no length says how long they are")
    if isinstance(source, str | os.PathLike) and is_remote(source):
        url = os.fspath(source)
        source = fetch_pair(url) if remote_is_pair(url) else fetch(url)
    if isinstance(source, str | os.PathLike):
        dataset = _open_path(Path(source), column)
    else:
        dataset = _open_object(source, column)
    if length is None or isinstance(dataset, TokenWindows):
        if length is not None and (dataset.length, dataset.stride) != (length, length if stride is None else stride):
            raise ValueError(f"{dataset} is cut already; it cannot be cut again to length={length}, stride={stride}")
        return dataset
    if isinstance(dataset, IndexedDataset) or (isinstance(dataset, np.ndarray) and dataset.ndim == 1):
        return TokenWindows(dataset, length, stride)
    raise ValueError(
        f"length={length} cuts a stream of tokens into windows, but {_name(source)} is not a stream (a .bin/.idx pair "
        "or a one-dimensional array); leave length out, or tokenize into .bin/.idx first"
    )


def _open_path(path: Path, column: str | None) -> Any:
    suffix = kind_of(path)
    if suffix in (".bin", ".idx") or (bin_path(path).is_file() and idx_path(path).is_file()):
        refuse_column(column, path)
        return IndexedDataset(path)
    if suffix == ".npy" and path.is_file():
        refuse_column(column, path)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise CorruptFileError(f"{path}: not a readable array ({error})") from None
        if array.ndim == 0:
            raise ValueError(f"{path}: a single number, not an array of samples or tokens")
        return array
    if suffix in PLAIN and path.exists():
        raise ValueError(f"{path}: text must become tokens first: penstock tokenize {path}. {_UNDERSTOOD}")
    if not path.exists():
        raise ValueError(f"{path}: there is no such file, nor {path}.bin with {path}.idx. {_UNDERSTOOD}")
    if path.is_dir() and not is_saved_dataset(path):
        check_one_dataset(path)
        raise ValueError(f"{path}: a directory; name a file in it. {_UNDERSTOOD}")
    from penstock.data_pipeline.datasets.tables import TABLE_SUFFIXES, read_table

    if suffix not in TABLE_SUFFIXES and not path.is_dir():
        raise ValueError(f"{path}: not a known kind of dataset. {_UNDERSTOOD}")
    return read_table(path, column)


def _open_object(source: Any, column: str | None) -> Any:
    module = type(source).__module__.partition(".")[0]
    if module in ("pyarrow", "pandas") and type(source).__name__ in ("Table", "DataFrame"):
        import pyarrow as pa

        from penstock.data_pipeline.datasets.tables import TableColumn

        table = source if module == "pyarrow" else pa.Table.from_pandas(source, preserve_index=False)
        return TableColumn(table, column, source=f"the {module} table")
    if module == "datasets" and type(source).__name__ == "Dataset" and column is not None:
        from penstock.data_pipeline.datasets.tables import TableColumn

        return TableColumn(source.with_format("arrow")[:], column, source="the Hugging Face dataset")
    refuse_column(column, source)
    if module == "pandas" and type(source).__name__ == "Series":
        return source.to_numpy()  # a series is indexed by its labels, a dataset by position
    if (hasattr(source, "__getitem__") and hasattr(source, "__len__")) or hasattr(source, "__iter__"):
        return source
    raise ValueError(f"{_name(source)} is not a dataset. {_UNDERSTOOD}")


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory is one that Hugging Face's ``save_to_disk`` wrote of a dataset."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def check_one_dataset(folder: Path) -> None:
    """Refuse a directory by Hugging Face's ``save_to_disk`` of several datasets, and name them."""
    saved = sorted(part.name for part in folder.iterdir() if is_saved_dataset(part))
    if saved:
        raise ValueError(f"{folder}: several datasets by save_to_disk; name one: {', '.join(saved)}")


def refuse_column(column: str | None, source: Any) -> None:
    """Refuse the name of a column where there is no table."""
    if column is not None:
        raise ValueError(f"column={column!r} names a column of a table, but {_name(source)} is not a table")


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else f"an object of type {type(source).__name__}"
