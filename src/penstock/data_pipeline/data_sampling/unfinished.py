"""The results of an analysis while it runs, on disk, so that it can be taken up again."""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.files import CorruptFileError, atomic_file, read_json, write_json

DIRECTORY: Final = "unfinished"
_STATE: Final = "state.json"
_COUNTS: Final = "counts.npy"
_SAVE_EVERY_S: Final = 5.0


class Unfinished:
    """Values of samples as shards of them come in, and which shards those are.

    The values lie in memory-mapped files of their final form. Every few seconds they are synced, and then the numbers
    of the shards that they hold are written: what is listed is there, whenever the process ends.

    Args:
        output: The analysis's directory; the files lie in ``unfinished`` below it.
        key: What the results depend on; what was left under another key is not taken up.
        bounds: Where the shards begin, and the end of the last.
        dtypes: Of each metric's values.
        passes: How often the shards are gone through.
        resume: Take up what is there; else begin anew.

    Attributes:
        directory: Where the files lie.
        bounds: Where the shards begin, and the end of the last.
        tokens: How many tokens the stored shards of the first pass have; None where that is not known.
        counts: How often each token number occurs in them, int64; empty where nothing is counted.
    """

    def __init__(
        self, output: Path, key: str, bounds: list[int], dtypes: dict[str, np.dtype[Any]], passes: int, *, resume: bool
    ) -> None:
        self.directory = output / DIRECTORY
        self.bounds = bounds
        self._key, self._dtypes = key, dtypes
        self._done = np.zeros((passes, len(bounds) - 1), dtype=bool)
        self.tokens: int | None = 0
        self.counts: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._values: dict[str, npt.NDArray[Any]] = {}
        if not (resume and self._take_up()):
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
        start, stop = self.bounds[shard], self.bounds[shard + 1]
        for name, found in values.items():
            self._values[name][start:stop] = found
        self._done[number, shard] = True
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Sync the values and list the shards that they hold."""
        for values in self._values.values():
            if isinstance(values, np.memmap):
                values.flush()
        with atomic_file(self.directory / _COUNTS) as file:
            np.lib.format.write_array(file, self.counts, allow_pickle=False)
        done = [_intervals(row) for row in self._done]
        write_json(self.directory / _STATE, {"key": self._key, "done": done, "tokens": self.tokens})
        self._saved_at = time.monotonic()

    def values(self, metric: str) -> npt.NDArray[Any]:
        """A metric's values, as far as they are there."""
        return self._values[metric]

    def file(self, metric: str) -> Path:
        """Where a metric's values lie."""
        return self.directory / f"{metric}.values.npy"

    def leave(self) -> None:
        """Keep what is there for another run; nothing if there is nothing."""
        if self._done.any():
            self.save()
            return
        self.remove()
        with contextlib.suppress(OSError):  # the directory was there before and is not empty
            self.directory.parent.rmdir()

    def remove(self) -> None:
        """Remove the directory with all that is left in it."""
        self._values.clear()
        shutil.rmtree(self.directory)

    def _begin(self) -> None:
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True)
        for name, dtype in self._dtypes.items():
            self._values[name] = new_array(self.file(name), self.bounds[-1], dtype)

    def _take_up(self) -> bool:
        """Open what an earlier run left; False if it left nothing that fits."""
        try:
            state = read_json(self.directory / _STATE)
            if not isinstance(state, dict) or state.get("key") != self._key:
                return False
            for row, intervals in zip(self._done, state["done"], strict=True):
                for start, stop in intervals:
                    row[start:stop] = True
            self.tokens = int(state["tokens"])
            self.counts = np.load(self.directory / _COUNTS, allow_pickle=False)
            for name, dtype in self._dtypes.items():
                values = np.load(self.file(name), mmap_mode="r+" if self.bounds[-1] else None, allow_pickle=False)
                if values.shape != (self.bounds[-1],) or values.dtype != dtype:
                    raise ValueError(f"{self.file(name)}: of another shape or dtype")
                self._values[name] = values
        except (CorruptFileError, OSError, ValueError, KeyError, TypeError):
            self._done[:] = False
            self.tokens, self.counts = 0, np.zeros(0, dtype=np.int64)
            self._values.clear()
            return False
        return True


def new_array(path: Path, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A new ``.npy`` file of zeros, mapped for writing; in memory alone where there is nothing to map."""
    if length:
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(length,))
    np.save(path, np.zeros(0, dtype=dtype), allow_pickle=False)
    return np.zeros(0, dtype=dtype)


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
