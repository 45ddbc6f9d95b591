"""Runs one function over many ranges of samples with Daft: on this machine's cores, or on a Ray cluster.

What travels through Daft is the ranges and a few arrays of results, never tokens: each range is read where the function
runs. So memory does not grow with the corpus, and on a cluster the corpus must lie where every machine can read it.
"""

import contextlib
import importlib.util
import io
import itertools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from penstock._core.suggest import unknown_name

Engine = Literal["native", "ray"]
ENGINES: Final = ("native", "ray")
RangeFunction = Callable[[int, int], Sequence[npt.NDArray[Any]]]

_FOUND, _WRONG, _FAILED = b"=", b"?", b"!"


def check_engine(engine: str) -> None:
    """Refuse an engine that is not known or not installed."""
    if engine not in ENGINES:
        raise ValueError(unknown_name("engine", engine, ENGINES))
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("engine 'ray' needs the package ray: pip install 'penstock[ray]'; or take engine 'native'")


def map_ranges(
    function: RangeFunction, bounds: Sequence[int], which: Sequence[int], engine: Engine = "native"
) -> Iterator[tuple[int, list[npt.NDArray[Any]]]]:
    """Compute ``function(bounds[i], bounds[i + 1])`` for some ranges, and yield each result as soon as it is there.

    Args:
        function: From the first and one past the last sample to arrays. On this machine it is called from several
            threads at once; on Ray it is pickled (by cloudpickle) and called in other processes.
        bounds: Where the ranges begin, and the end of the last.
        which: Which of the ranges to compute.
        engine: ``native`` or ``ray``. Ray is initialized as usual (``RAY_ADDRESS``, else on this machine).

    Yields:
        ``(number of the range, its arrays)``, in any order.

    Raises:
        ValueError: The function raised one, or Daft runs on another engine in this process already.
        RuntimeError: The function raised anything else; the message has its traceback.
    """
    if not len(which):
        return
    daft = _daft(engine)

    # Daft pickles what it calls even where nothing travels, so here it is given a ticket, not the dataset; and what is
    # found stays where it is.
    errand = _Errand(function)
    ticket = next(_tickets)
    _running[ticket] = errand
    work = _Ticket(ticket) if engine == "native" else _Parcel(function)

    @daft.udf(return_dtype=daft.DataType.binary(), batch_size=1)  # type: ignore[untyped-decorator,unused-ignore]
    def compute(number: Any, start: Any, end: Any) -> list[bytes]:
        rows = zip(number.to_pylist(), start.to_pylist(), end.to_pylist(), strict=True)
        return [work(i, a, b) for i, a, b in rows]

    ranges = list(itertools.pairwise(bounds))
    starts, ends = [ranges[i][0] for i in which], [ranges[i][1] for i in which]
    frame = daft.from_pydict({"range": list(which), "start": starts, "end": ends})
    if engine == "ray":
        frame = frame.repartition(min(len(which), _RAY_PARTITIONS))
    columns = [daft.col(name) for name in ("range", "start", "end")]
    batches = frame.into_batches(1).select("range", compute(*columns).alias("found")).to_arrow_iter()
    try:
        for batch in batches:
            for row in batch.to_pylist():
                number, answer = row["range"], _opened(row["found"])
                yield number, errand.found.pop(number) if engine == "native" else answer
    finally:
        # Daft cannot be left in the middle: what has not begun here ends at once, and the rest is waited for.
        del _running[ticket]
        if engine == "native":
            for _ in batches:
                pass


@dataclass(frozen=True)
class _Errand:
    """A function of this process that Daft calls, and what it has found by the number of the range."""

    function: RangeFunction
    found: dict[int, list[npt.NDArray[Any]]] = field(default_factory=dict)


_tickets = itertools.count()
_running: dict[int, _Errand] = {}


@dataclass(frozen=True)
class _Ticket:
    """Stands for an errand of this process, whose arrays stay here."""

    number: int

    def __call__(self, number: int, start: int, stop: int) -> bytes:
        errand = _running.get(self.number)
        if errand is None:
            return _FOUND
        kind, arrays = _tried(errand.function, start, stop)
        errand.found[number] = arrays
        return kind


@dataclass(frozen=True)
class _Parcel:
    """The function itself, for other processes, whose arrays come back as bytes."""

    function: RangeFunction

    def __call__(self, number: int, start: int, stop: int) -> bytes:
        kind, arrays = _tried(self.function, start, stop)
        file = io.BytesIO()
        file.write(kind)
        for array in arrays:
            np.lib.format.write_array(file, array, allow_pickle=False)
        return file.getvalue()


_RAY_PARTITIONS: Final = 1024


def _daft(engine: Engine) -> Any:
    check_engine(engine)
    os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    import daft

    # Daft takes one engine for the life of a process, and says no more than that when another is wanted.
    with contextlib.suppress(Exception):
        if engine == "ray":
            daft.set_runner_ray(noop_if_initialized=True)
        else:
            daft.set_runner_native()
    running = daft.get_or_infer_runner_type()
    if running != engine:
        raise ValueError(f"Daft runs on engine {running!r} in this process already; start another for {engine!r}")
    return daft


def _tried(function: RangeFunction, start: int, stop: int) -> tuple[bytes, list[npt.NDArray[Any]]]:
    """The arrays, or the error as text: engines differ in what becomes of an exception."""
    try:
        return _FOUND, list(function(start, stop))
    except ValueError as error:
        return _WRONG + str(error).encode(), []
    except Exception:  # whatever a user's function may raise is told with its traceback where the work was asked for
        return _FAILED + traceback.format_exc().encode(), []


def _opened(found: bytes) -> list[npt.NDArray[Any]]:
    kind, rest = found[:1], found[1:]
    if kind == _WRONG:
        raise ValueError(rest.decode())
    if kind == _FAILED:
        raise RuntimeError(f"the work on a range of samples failed:\n{rest.decode()}")
    file = io.BytesIO(rest)
    arrays = []
    while file.tell() < len(rest):
        arrays.append(np.lib.format.read_array(file, allow_pickle=False))
    return arrays
