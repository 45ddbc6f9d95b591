"""The results of an analysis while it runs, on disk, so that it can be taken up again."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.files import CorruptFileError, atomic_file, read_json, reserve, write_json
from penstock.data_pipeline.data_sampling.measurement import Form

DIRECTORY: Final = "unfinished"
STATE: Final = "state.json"
_COUNTS: Final = ("counts.0.npy", "counts.1.npy")
_SAVE_EVERY_S: Final = 5.0


class Unfinished:
    """Values of samples as shards of them come in, and which shards those are.

    The values lie in memory-mapped files of their final form, and beside them for each total a row per shard. Every few
    seconds they are synced, and then the numbers of the shards that they hold are written: what is listed is there,
    whenever the process ends.

    Args:
        output: The analysis's directory; the files lie in ``unfinished`` below it.
        key: What the results depend on; what was left under another key is not taken up.
        bounds: Where the shards begin, and the end of the last.
        dtypes: Of each metric's values.
        passes: How often the shards are gone through.
        totals: What is added up over all samples, by name.
        resume: Take up what is there; else begin anew.
        overwrite: Begin anew also where shards are there that are not taken up.

    Attributes:
        directory: Where the files lie.
        key: What the results depend on.
        bounds: Where the shards begin, and the end of the last.
        totals: Names of what is added up.
        tokens: How many tokens the stored shards of the first pass have; None where that is not known.
        counts: How often each token number occurs in them, int64; empty where nothing is counted.

    Raises:
        ValueError: There are shards which are not taken up, and ``overwrite`` is not set.
        OSError: The disk has no room for the values.
    """

    def __init__(
        self,
        output: Path,
        key: str,
        bounds: list[int],
        dtypes: Mapping[str, np.dtype[Any]],
        passes: int,
        *,
        totals: Mapping[str, Form] | None = None,
        resume: bool,
        overwrite: bool = False,
    ) -> None:
        self.directory = output / DIRECTORY
        self.bounds = bounds
        self.totals = tuple(totals or ())
        self.key = key
        self._forms = {name: Form(dtype, (bounds[-1],)) for name, dtype in dtypes.items()}
        for name, form in (totals or {}).items():
            self._forms[name] = Form(form.dtype, (len(bounds) - 1, *form.shape))
        self._done = np.zeros((passes, len(bounds) - 1), dtype=bool)
        self.tokens: int | None = 0
        self.counts: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._counts_file = _COUNTS[0]
        self._values: dict[str, npt.NDArray[Any]] = {}
        if not (resume and self._take_up()):
            if not overwrite:
                self._refuse_loss(resume)
            self._begin()
        self._saved_at = time.monotonic()

    def missing(self, number: int) -> list[int]:
        """The shards that pass ``number`` has not gone through."""
        return np.flatnonzero(~self._done[number]).tolist()

    def done_samples(self, number: int) -> int:
        """How many samples pass ``number`` has gone through."""
        return int(np.diff(self.bounds)[self._done[number]].sum())

    def store(self, number: int, shard: int, values: dict[str, npt.NDArray[Any]]) -> None:
        """Keep what pass ``number`` found of one shard; synced with the next :meth:`save`, seconds later."""
        place = slice(self.bounds[shard], self.bounds[shard + 1])
        for name, found in values.items():
            self._values[name][shard if name in self.totals else place] = found
        self._done[number, shard] = True
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Sync the values and list the shards that they hold."""
        for values in self._values.values():
            if isinstance(values, np.memmap):
                values.flush()
        # Not over the counts that the last state names: they hold its shards and no others, should this end here.
        self._counts_file = _COUNTS[self._counts_file == _COUNTS[0]]
        with atomic_file(self.directory / self._counts_file) as file:
            np.lib.format.write_array(file, self.counts, allow_pickle=False)
        done = [_intervals(row) for row in self._done]
        facts = {"key": self.key, "done": done, "tokens": self.tokens, "counts": self._counts_file}
        write_json(self.directory / STATE, facts)
        self._saved_at = time.monotonic()

    def values(self, metric: str) -> npt.NDArray[Any]:
        """A metric's values, as far as they are there."""
        return self._values[metric]

    def total(self, name: str) -> npt.NDArray[Any]:
        """What has been added up: the shards' rows in their order, so that floats have the same sum every time."""
        rows = self._values[name]
        total = np.zeros(rows.shape[1:], dtype=rows.dtype)
        for row in rows:
            total += row
        return total

    def file(self, name: str) -> Path:
        """Where a metric's values lie, or a total's rows."""
        return self.directory / f"{name}.{'shards' if name in self.totals else 'values'}.npy"

    def leave(self) -> None:
        """Keep what is there for another run; nothing if there is nothing."""
        if self._done.any():
            self.save()
            return
        self._values.clear()
        shutil.rmtree(self.directory)

    def _refuse_loss(self, resume: bool) -> None:
        """Raise if beginning anew would remove what was measured."""
        try:
            shards = sum(stop - start for start, stop in read_json(self.directory / STATE)["done"][0])
        except (CorruptFileError, KeyError, IndexError, TypeError, ValueError):
            return  # nothing that could be taken up
        if shards:
            what = (
                "that do not fit: of other samples, metrics or models, or damaged"
                if resume
                else "of an analysis that was cut off; say resume (--resume) to go on with it"
            )
            raise ValueError(
                f"{self.directory}: there are {shards} measured shards {what}; say overwrite (--overwrite) to "
                "begin anew"
            )

    def _begin(self) -> None:
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True)
        try:
            for name, form in self._forms.items():
                self._values[name] = new_array(self.file(name), form)
        except OSError:
            self.leave()
            raise

    def _take_up(self) -> bool:
        """Open what an earlier run left; False if it left nothing that fits."""
        try:
            state = read_json(self.directory / STATE)
            if not isinstance(state, dict) or state.get("key") != self.key:
                return False
            for row, intervals in zip(self._done, state["done"], strict=True):
                for start, stop in intervals:
                    row[start:stop] = True
            self.tokens = int(state["tokens"])
            self._counts_file = _COUNTS[_COUNTS.index(state["counts"])]
            self.counts = np.load(self.directory / self._counts_file, allow_pickle=False)
            for name, form in self._forms.items():
                values = np.load(self.file(name), mmap_mode="r+" if 0 not in form.shape else None, allow_pickle=False)
                if Form(values.dtype, values.shape) != form:
                    raise ValueError(f"{self.file(name)}: of another shape or dtype")
                self._values[name] = values
        except (CorruptFileError, OSError, ValueError, KeyError, TypeError):
            self._done[:] = False
            self.tokens, self.counts = 0, np.zeros(0, dtype=np.int64)
            self._values.clear()
            return False
        return True


def new_array(path: Path, form: Form) -> npt.NDArray[Any]:
    """A new ``.npy`` file of zeros, mapped for writing; in memory alone where there is nothing to map.

    Raises:
        OSError: The disk has no room for it.
    """
    if 0 not in form.shape:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=form.dtype, shape=form.shape)
        reserve(path)
        return array
    empty = np.zeros(form.shape, dtype=form.dtype)
    np.save(path, empty, allow_pickle=False)
    return empty


def sync_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Make a mapped array's file durable."""
    if isinstance(array, np.memmap):
        array.flush()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _intervals(row: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Runs of True as ``[start, stop]``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2).tolist()
