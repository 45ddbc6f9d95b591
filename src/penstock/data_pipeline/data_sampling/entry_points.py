"""The samples sorted by when they enter the pool, in memory or in a file that later starts map.

A counting sort: one pass over the metrics counts the samples of each block, another writes each sample to the next
place of its block. Both look at a few million samples at a time, so that memory does not grow with their number; the
result is the only thing of that size, and it is a file where one is wanted::

    cache/<key>/order.bin       samples, little-endian uint32 (int64 from 2**32 samples on)
    cache/<key>/manifest.json   sizes and births of the blocks, SHA-256

The key is a digest of the metrics' data and schedules. A start finds the file by it, checks its size and maps it;
nothing is read before a sample is asked for. :meth:`EntryPoints.verify` compares the bytes with the checksum.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.files import CorruptFileError, read_manifest, reserve, sync_directory, write_manifest
from penstock._core.lock import locked
from penstock.data_pipeline.data_sampling.births import DifficultyMetric, birth_steps, schedule_identity
from penstock.data_pipeline.data_sampling.order import digest_of
from penstock.data_pipeline.data_sampling.thresholds import Thresholds, chunks

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many samples are done, and how many there are."""

_FILE: Final = "order.bin"
_KIND: Final = "penstock entry points"
_LAYOUT: Final = 1


@dataclass(frozen=True)
class EntryPoints:
    """The samples sorted by when they enter the pool.

    Attributes:
        order: Admitted samples, sorted by block and then by number; uint32, or int64 from 2**32 samples on.
        sizes: Samples in each block; none is empty.
        steps: The step at which each block enters.
        never: How many samples no step admits (their metric is above the schedule's largest difficulty).
        folder: Where they are stored; None for those in memory.
    """

    order: npt.NDArray[Any]
    sizes: list[int]
    steps: list[int]
    never: int
    folder: Path | None = None

    def digest(self) -> str:
        """A digest of the samples' order and of the blocks, the same for those in memory and those in a file."""
        if self.folder is not None:
            content = read_manifest(self.folder, verify=False)["files"][_FILE]["sha256"]
        else:
            content = _sha256(self.order)
        return digest_of("entry points", content, self.sizes, self.steps)

    def verify(self) -> None:
        """Compare a stored order with its checksum.

        Raises:
            CorruptFileError: It was altered.
        """
        if self.folder is not None:
            read_manifest(self.folder)


def entry_points(
    metrics: Sequence[DifficultyMetric],
    cache: str | os.PathLike[str] | None = None,
    *,
    identity: str | None = None,
    check: Callable[[], None] | None = None,
    progress: Progress | None = None,
    deadline_s: float = 3600.0,
) -> EntryPoints:
    """Sort samples by their entry point over all metrics, or map what an earlier start has sorted.

    Args:
        metrics: At least one, all over the same samples.
        cache: A directory for stored orders; None sorts in memory.
        identity: A digest of the metrics' data and schedules; None makes one, which reads all values.
        check: Called before values are read, which a stored order makes unnecessary; raises if they are damaged.
        progress: Told how far the sorting is.
        deadline_s: How long to wait for another process that is sorting the same, in seconds.

    Raises:
        ValueError: Metrics differ in their number of samples, a value is NaN, or the first step admits no sample.
        TimeoutError: Another process is sorting the same and takes longer than ``deadline_s``.
    """
    counts = {metric.name: len(metric.values) for metric in metrics}
    if len(set(counts.values())) != 1:
        raise ValueError(f"every metric needs one value per sample, but they have {counts}")
    check = check or (lambda: None)
    if cache is None:
        check()
        return _sorted(metrics, None, progress)
    key = digest_of(_KIND, _LAYOUT, metrics_identity(metrics) if identity is None else identity)
    folder = Path(cache) / key
    if not _stored(folder):
        with locked(Path(cache) / f"{key}.lock", "is sorting these samples", wait_s=deadline_s):
            if not _stored(folder):
                check()
                aside = Path(cache) / f"{key}.tmp"
                shutil.rmtree(aside, ignore_errors=True)  # of a start that was killed
                aside.mkdir()
                _sorted(metrics, aside, progress)
                aside.rename(folder)
                sync_directory(cache)
    return _open(folder)


def metrics_identity(metrics: Sequence[DifficultyMetric]) -> str:
    """A digest of the metrics' values and schedules, from the values themselves."""
    parts: list[object] = []
    for metric in metrics:
        parts += [metric.name, metric.difficulty_type, schedule_identity(metric.scheduler), np.asarray(metric.values)]
    return digest_of(*parts)


def _sorted(metrics: Sequence[DifficultyMetric], folder: Path | None, progress: Progress | None) -> EntryPoints:
    count = len(metrics[0].values)
    steps = birth_steps([metric.scheduler for metric in metrics])
    tell = progress or (lambda what, done, total: None)
    for metric in metrics:  # before a selection by rank, to which NaN would be a number
        for part in chunks(count):
            metric.check_numbers(part)
    thresholds = [
        (metric, metric.thresholds([metric.scheduler.get_difficulty(step) for step in steps])) for metric in metrics
    ]
    sizes = np.zeros(len(steps) + 1, dtype=np.int64)
    for part in chunks(count):
        sizes += np.bincount(_blocks(thresholds, part), minlength=len(steps) + 1)
        tell("counting", part.stop, count)
    if sizes[0] == 0:
        raise ValueError(f"no sample is easy enough for the first step: {_hardest(metrics)}; raise min_difficulty")
    never = int(sizes[-1])
    dtype = np.dtype("<u4") if count <= 1 << 32 else np.dtype("<i8")
    order: npt.NDArray[Any] = (
        np.empty(count - never, dtype=dtype)
        if folder is None
        else np.memmap(folder / _FILE, dtype=dtype, mode="w+", shape=(count - never,))
    )
    if folder is not None:
        reserve(folder / _FILE)
    place = np.cumsum(sizes) - sizes
    for part in chunks(count):
        blocks = _blocks(thresholds, part)
        by_block = np.argsort(blocks, kind="stable")
        here = np.bincount(blocks, minlength=len(sizes))
        ends = np.cumsum(here)
        for block in np.flatnonzero(here[:-1]):
            found = by_block[ends[block] - here[block] : ends[block]]
            np.add(found, part.start, out=order[place[block] : place[block] + here[block]], casting="unsafe")
        place += here
        tell("sorting", part.stop, count)
    filled = np.flatnonzero(sizes[:-1])
    result = EntryPoints(order, sizes[filled].tolist(), [steps[block] for block in filled], never)
    if folder is not None:
        _seal(folder, result)
    return result


def _blocks(thresholds: Sequence[tuple[DifficultyMetric, Thresholds]], part: slice) -> npt.NDArray[np.uint16]:
    """The block of each sample of a chunk: the latest over the metrics."""
    first, *others = [found.blocks(np.asarray(metric.values[part]), part.start) for metric, found in thresholds]
    for other in others:
        np.maximum(first, other, out=first)
    return first


def _seal(folder: Path, points: EntryPoints) -> None:
    assert isinstance(points.order, np.memmap)
    points.order.flush()
    with (folder / _FILE).open("rb") as file:
        os.fsync(file.fileno())
    write_manifest(
        folder,
        [_FILE],
        kind=_KIND,
        dtype=points.order.dtype.str,
        sizes=points.sizes,
        steps=points.steps,
        never=points.never,
    )


def _stored(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _open(folder: Path) -> EntryPoints:
    manifest = read_manifest(folder, verify=False)
    sizes: Any = manifest.get("sizes")
    steps: Any = manifest.get("steps")
    never: Any = manifest.get("never")
    well_formed = (
        manifest.get("kind") == _KIND
        and manifest.get("dtype") in ("<u4", "<i8")
        and isinstance(never, int)
        and isinstance(sizes, list)
        and isinstance(steps, list)
        and len(sizes) == len(steps) > 0
        and all(isinstance(number, int) for number in (*sizes, *steps))
    )
    if not well_formed or _FILE not in manifest["files"]:
        raise CorruptFileError(f"{folder}: its manifest is not that of stored entry points; remove the directory")
    dtype, path = np.dtype(manifest["dtype"]), folder / _FILE
    expected = sum(sizes) * dtype.itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise CorruptFileError(f"{path}: {found} bytes, but its blocks take {expected}; remove {folder}")
    order = np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # indexing a plain view is quicker
    return EntryPoints(order, sizes, steps, int(never), folder)


def _sha256(order: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(order).data).hexdigest()


def _hardest(metrics: Sequence[DifficultyMetric]) -> str:
    return ", ".join(
        f"{metric.name} starts at {metric.difficulty_type} {metric.scheduler.get_difficulty(0)}"
        + (f" and its smallest value is {metric.values.min()}" if len(metric.values) else "")
        for metric in metrics
    )
