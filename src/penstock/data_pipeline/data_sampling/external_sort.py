"""Sorting more numbers than fit into memory: which sample has the smallest value, the next, and so on."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt

RUN: Final = 1 << 23
"""Samples sorted in memory at once: 300 MB."""

_PROBES: Final = 1 << 14


def sort_order(values: npt.NDArray[Any], out: npt.NDArray[np.int64], *, run: int = RUN) -> None:
    """Write the stable order of ``values`` to ``out``: equal values stay in the order of their numbers.

    Up to ``run`` values are sorted in memory. More are sorted in runs, which lie in temporary files beside ``out`` and
    are merged range by range: values between two of the sampled splitters are gathered from all runs and sorted, and
    values equal to a splitter, which may be any number of them, are copied run by run.

    Args:
        values: One dimension of numbers without NaN, mapped or not.
        out: int64 of the same length; a map of the file that is to hold the order.
        run: Values in memory at once, about.

    Raises:
        ValueError: ``run`` is below 1 or the lengths differ.
    """
    if run < 1 or out.shape != values.shape:
        raise ValueError(
            f"run must be at least 1 and out as long as values, got run={run}, {out.shape}, {values.shape}"
        )
    if len(values) <= run:
        out[:] = _stable_order(np.asarray(values))
        return
    place = Path(out.filename).parent if isinstance(out, np.memmap) and out.filename else None
    with TemporaryDirectory(dir=place, prefix=".sort.") as scratch:
        runs = [_sorted_run(values, start, run, Path(scratch)) for start in range(0, len(values), run)]
        at = 0
        for part in _merged(runs, _splitters(runs, run)):
            out[at : at + len(part)] = part
            at += len(part)
    assert at == len(values)


def _stable_order(values: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """As ``numpy.argsort(values, kind="stable")``, which has a radix sort for 16 bits only: those, lowest first."""
    keys = _keys(values)
    if not len(keys):
        return np.zeros(0, dtype=np.intp)
    keys -= keys.min()
    bits = int(keys.max()).bit_length()
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(16, bits, 16):
        digits = (keys >> np.uint64(shift)).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def _keys(values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Whole numbers that are in the order of the values: of negative floats all bits but the sign are turned."""
    sign = np.uint64(1 << 63)
    if values.dtype.kind == "u":
        return values.astype(np.uint64)
    if values.dtype.kind != "f":
        return values.astype(np.int64).view(np.uint64) ^ sign
    bits = (values.astype(np.float64) + 0.0).view(np.int64)  # -0.0 becomes 0.0, its equal
    return (bits ^ ((bits >> 63) & np.int64((1 << 63) - 1))).view(np.uint64) ^ sign


class _Run:
    """A sorted stretch of the values and where it has been read to."""

    def __init__(self, keys: npt.NDArray[Any], samples: npt.NDArray[np.int64]) -> None:
        self.keys, self.samples = keys, samples
        self.at = 0

    def take(self, value: Any, side: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """What was not taken yet of the keys below ``value`` (``left``) or up to it (``right``)."""
        start = self.at
        end = len(self.keys) if value is None else int(np.searchsorted(self.keys, value, side=side))  # type: ignore[call-overload]
        self.at = max(start, end)
        return self.keys[start : self.at], self.samples[start : self.at]


def _sorted_run(values: npt.NDArray[Any], start: int, run: int, scratch: Path) -> _Run:
    part = np.asarray(values[start : start + run])
    order = _stable_order(part)
    keys, samples = scratch / f"{start}.keys.npy", scratch / f"{start}.samples.npy"
    np.save(keys, part[order], allow_pickle=False)
    np.save(samples, order + start, allow_pickle=False)
    return _Run(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in (keys, samples)))


def _splitters(runs: list[_Run], run: int) -> npt.NDArray[Any]:
    """Values that part the whole into ranges of about half a run each."""
    probes = np.sort(np.concatenate([r.keys[:: max(1, len(r.keys) // (_PROBES // len(runs) + 1))] for r in runs]))
    ranges = 2 * len(runs)
    return np.unique(probes[np.arange(1, ranges) * len(probes) // ranges])


def _merged(runs: list[_Run], splitters: npt.NDArray[Any]) -> Iterator[npt.NDArray[np.int64]]:
    for splitter in splitters:
        yield _between([run.take(splitter, "left") for run in runs])
        for run in runs:  # in the order of their samples, as equal values must be
            yield run.take(splitter, "right")[1]
    yield _between([run.take(None, "left") for run in runs])


def _between(parts: list[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]) -> npt.NDArray[np.int64]:
    keys = np.concatenate([keys for keys, _ in parts])
    samples: npt.NDArray[np.int64] = np.concatenate([samples for _, samples in parts])
    return samples[_stable_order(keys)]
