"""What an analyzer leaves on disk: for each metric its values, and the samples sorted by them."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from penstock._core.files import (
    MANIFEST_NAME,
    CorruptFileError,
    atomic_file,
    read_manifest,
    sync_directory,
    write_manifest,
)
from penstock._core.lock import locked
from penstock._core.suggest import unknown_name
from penstock.data_pipeline.data_sampling.external_sort import sort_order
from penstock.data_pipeline.data_sampling.fingerprint import fingerprint
from penstock.data_pipeline.data_sampling.measurement import Form, check_whole
from penstock.data_pipeline.data_sampling.unfinished import DIRECTORY, STATE, Unfinished, new_array, sync_array

TABLE: Final = "samples.parquet"
COUNTS: Final = "token_counts.npy"
_KIND: Final = "penstock analysis"
_ROW_GROUP: Final = 1 << 20


class Analysis:
    """A stored analysis, memory-mapped.

    The directory holds ``NAME.values.npy`` (one number per sample), ``NAME.order.npy`` (int64, the samples sorted by
    it, equal values in sample order), the values of all metrics as ``samples.parquet`` for other tools,
    ``NAME.total.npy`` for each total, ``token_counts.npy`` where tokens were counted, and a manifest with sizes,
    checksums and the dataset's fingerprint.

    Attributes:
        directory: Where it lies.
        metrics: Names of the metrics.
        num_samples: How many samples were analyzed.
        num_tokens: How many tokens they have; None where that is not known.
        fingerprint: Of the dataset that was analyzed; None where that is not known.
        own_tokens: Whether the analyzer was told by a ``tokens_of`` where a sample's tokens are.
        totals: Names of what was added up over all samples.
    """

    def __init__(
        self,
        directory: Path,
        metrics: tuple[str, ...],
        num_samples: int,
        num_tokens: int | None,
        fingerprint: str | None = None,
        own_tokens: bool = False,
        totals: tuple[str, ...] = (),
    ) -> None:
        self.directory = directory
        self.metrics = metrics
        self.num_samples = num_samples
        self.num_tokens = num_tokens
        self.fingerprint = fingerprint
        self.own_tokens = own_tokens
        self.totals = totals

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Self:
        """Open an analysis.

        Args:
            path: Its directory.
            verify: Check every file's SHA-256 (one pass over the files); their sizes are checked always.

        Raises:
            CorruptFileError: The manifest or a file is missing, cut short or altered.
        """
        directory = Path(path)
        manifest = read_manifest(directory, verify=verify)
        metrics, samples, tokens = manifest.get("metrics"), manifest.get("num_samples"), manifest.get("num_tokens")
        mark, totals = manifest.get("fingerprint"), manifest.get("totals", [])
        if (
            manifest.get("kind") != _KIND
            or not isinstance(metrics, list)
            or not isinstance(totals, list)
            or not all(isinstance(name, str) for name in (*metrics, *totals))
            or not isinstance(samples, int)
            or not isinstance(tokens, int | None)
            or not isinstance(mark, str | None)
        ):
            raise CorruptFileError(f"{directory}: its manifest is not that of an analysis")
        for file in (*_files(metrics), *map(_total_file, totals)):
            if file not in manifest["files"]:
                raise CorruptFileError(f"{directory}: the manifest does not list {file}")
        own_tokens = manifest.get("own_tokens") is True
        return cls(directory, tuple(metrics), samples, tokens, mark, own_tokens, tuple(totals))

    def values(self, metric: str) -> npt.NDArray[Any]:
        """The metric of each sample, a read-only view of the file."""
        return self._array(metric, _values_file(metric))

    def order(self, metric: str) -> npt.NDArray[np.int64]:
        """The samples sorted by the metric, int64, a read-only view of the file."""
        return self._array(metric, _order_file(metric))

    def token_counts(self) -> npt.NDArray[np.int64]:
        """How often each token number occurs in the dataset, int64.

        Raises:
            ValueError: No metric of this analysis needed them, so they were not counted.
        """
        path = self.directory / COUNTS
        if not path.is_file():
            raise ValueError(f"{self.directory}: tokens were not counted; analyze with the metric vocabularyrarity")
        return _load(path)

    def total(self, name: str) -> npt.NDArray[Any]:
        """What a function of the whole dataset added up to: int64 or float64, of the function's shape."""
        if name not in self.totals:
            raise ValueError(f"{self.directory}: {unknown_name('total', name, self.totals)}")
        return _load(self.directory / _total_file(name))

    def check_dataset(self, dataset: Any, tokens_of: Callable[[Any], Any] | None = None) -> None:
        """Refuse a dataset that is not the analyzed one; see :func:`fingerprint` for what is compared.

        Args:
            dataset: A map-style dataset.
            tokens_of: From sample to its tokens; see :func:`ragged_batches`.

        Raises:
            ValueError: It has another number of samples or other tokens, or its samples are no sequences of tokens.
        """
        if len(dataset) != self.num_samples:
            raise ValueError(
                f"{self.directory}: the analysis is of {self.num_samples} samples, but the dataset has {len(dataset)}; "
                "analyze this dataset (for windows, with the same length)"
            )
        if self.fingerprint is None or (self.own_tokens and tokens_of is None):
            return  # where the tokens are in a sample is not known here
        if fingerprint(dataset, tokens_of) != self.fingerprint:
            raise ValueError(
                f"{self.directory}: the analysis is of other tokens than this dataset's: another corpus, one tokenized "
                "anew, or windows cut elsewhere; analyze this dataset, or name NAME.values.npy in that directory to "
                "take the numbers as they are"
            )

    def _array(self, metric: str, file: str) -> npt.NDArray[Any]:
        if metric not in self.metrics:
            raise ValueError(f"{self.directory}: {unknown_name('metric', metric, self.metrics)}")
        path = self.directory / file
        found = _load(path, "r" if self.num_samples else None)
        if found.shape != (self.num_samples,):
            raise CorruptFileError(f"{path}: shape {found.shape}, but {self.num_samples} samples were analyzed")
        return found


def seal_analysis(
    directory: str | os.PathLike[str],
    store: Unfinished,
    metrics: Sequence[str],
    num_samples: int,
    *,
    fingerprint: str | None,
    own_tokens: bool = False,
    counts: npt.NDArray[np.int64] | None = None,
) -> Analysis:
    """Sort the samples by each metric, write the table, and put all files in place under a manifest.

    Everything, the manifest too, is written beside the values before the first file is moved, so that whenever the
    process ends, either the values are still together or :func:`put_in_place` can end what was begun.

    Args:
        directory: Where the analysis goes.
        store: All values.
        metrics: Names of the metrics, in order.
        num_samples: How many samples there are.
        fingerprint: Of the dataset, if known.
        own_tokens: Whether a ``tokens_of`` said where a sample's tokens are.
        counts: How often each token number occurs, where it was counted.
    """
    target = Path(directory)
    with ThreadPoolExecutor(1) as aside:  # which writes and waits for the disk while the samples are sorted
        columns = {name: store.values(name) for name in metrics}
        written = [aside.submit(_write_table, store.directory / TABLE, columns, num_samples)]
        arrays = {_total_file(name): store.total(name) for name in store.totals}
        arrays |= {} if counts is None else {COUNTS: counts}
        written += [aside.submit(_save, store.directory / file, array) for file, array in arrays.items()]
        for name, values in columns.items():
            path = store.directory / _order_file(name)
            order = new_array(path, Form(np.dtype(np.int64), (num_samples,)))
            sort_order(values, order)
            written += [aside.submit(sync_array, path, order), aside.submit(sync_array, store.file(name), values)]
    for task in written:
        task.result()
    files = sorted({*_files(metrics), TABLE, *arrays})
    names = {"metrics": list(metrics), "totals": list(store.totals)}
    facts = {"kind": _KIND, "key": store.key, **names, "num_samples": num_samples, "num_tokens": store.tokens}
    write_manifest(store.directory, files, fingerprint=fingerprint, own_tokens=own_tokens, **facts)
    return put_in_place(target)


def sealed_key(directory: str | os.PathLike[str]) -> str | None:
    """The key of an analysis that was sealed but not, or not yet fully, put in place; None if there is none."""
    try:
        key = read_manifest(Path(directory) / DIRECTORY, verify=False).get("key")
    except CorruptFileError:
        return None
    return key if isinstance(key, str) else None


def put_in_place(directory: str | os.PathLike[str]) -> Analysis:
    """Move a sealed analysis from its unfinished directory to where it belongs, or go on with that.

    A manifest from before is removed first and the new one comes last: the directory is either sealed and whole, or has
    no manifest.
    """
    target = Path(directory)
    staged = target / DIRECTORY
    files = read_manifest(staged, verify=False)["files"]
    (target / MANIFEST_NAME).unlink(missing_ok=True)
    for file in files:
        if (staged / file).exists():  # not moved already, by a process that ended here
            (staged / file).replace(target / file)
    sync_directory(target)
    (staged / STATE).unlink(missing_ok=True)  # from here on there is nothing to go on with
    (staged / MANIFEST_NAME).replace(target / MANIFEST_NAME)
    sync_directory(target)
    shutil.rmtree(staged)
    return Analysis.load(target, verify=False)


@contextmanager
def analyzing(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of the process that writes an analysis; a directory that stays empty is removed.

    Raises:
        TimeoutError: Another process holds it.
    """
    target = Path(directory)
    try:
        with locked(target / "unfinished.lock", f"is writing the analysis {target}"):
            yield
    finally:
        with suppress(OSError):  # it is not empty
            target.rmdir()


def store_analysis(
    directory: str | os.PathLike[str],
    values: Mapping[str, npt.ArrayLike],
    *,
    totals: Mapping[str, npt.NDArray[Any]] | None = None,
    num_tokens: int | None = None,
) -> Analysis:
    """Store numbers that were found elsewhere as an analysis.

    Args:
        directory: Where it goes.
        values: For each metric a number per sample; at least one metric.
        totals: Sums over all samples, by name.
        num_tokens: Tokens of all samples, if known.

    Raises:
        TimeoutError: Another process is writing an analysis there.
        ValueError: There is no metric, or they are not all of one length, finite, of one dimension, and within int64;
            or what an analyzer that was cut off has measured is there.
    """
    columns = {name: np.asarray(found) for name, found in values.items()}
    shapes = {found.shape for found in columns.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"an analysis needs one number per sample for each metric, got the shapes {sorted(shapes)}")
    for name, found in columns.items():
        if found.dtype.kind not in "biuf" or not np.isfinite(found).all():
            raise ValueError(f"metric {name!r}: expected finite numbers, got {found.dtype}")
        check_whole(f"metric {name!r}", found)
        columns[name] = found.astype(np.float64 if found.dtype.kind == "f" else np.int64)
    count = len(next(iter(columns.values())))
    dtypes = {name: found.dtype for name, found in columns.items()}
    forms = {name: Form(found.dtype, found.shape) for name, found in (totals or {}).items()}
    with analyzing(directory):
        store = Unfinished(Path(directory), "", [0, count], dtypes, 1, totals=forms, resume=False)
        store.store(0, 0, {**columns, **(totals or {})})
        store.tokens = num_tokens
        return seal_analysis(directory, store, tuple(columns), count, fingerprint=None)


def _write_table(path: Path, values: dict[str, npt.NDArray[Any]], num_samples: int) -> None:
    """The values as a Parquet table for other tools: a row per sample, its number first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("sample", pa.int64()), *((name, pa.from_numpy_dtype(found.dtype)) for name, found in values.items())]
    schema = pa.schema(fields)
    # Numbers that hardly repeat need no dictionary, and whole ones lie close to their neighbours.
    encodings = {field.name: "DELTA_BINARY_PACKED" for field in schema if pa.types.is_integer(field.type)}
    how: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "column_encoding": encodings}
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, **how) as writer:
        for start in range(0, num_samples, _ROW_GROUP):
            stop = min(start + _ROW_GROUP, num_samples)
            columns = [pa.array(np.arange(start, stop)), *(pa.array(found[start:stop]) for found in values.values())]
            writer.write_table(pa.table(columns, schema=schema))


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with atomic_file(path) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> npt.NDArray[Any]:
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CorruptFileError(f"{path}: not a readable array ({error})") from None
    return found


def _files(metrics: Sequence[str]) -> list[str]:
    return [file for name in metrics for file in (_values_file(name), _order_file(name))]


def _values_file(metric: str) -> str:
    return f"{metric}.values.npy"


def _order_file(metric: str) -> str:
    return f"{metric}.order.npy"


def _total_file(name: str) -> str:
    return f"{name}.total.npy"
