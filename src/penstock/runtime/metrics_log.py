"""``metrics.jsonl``: one JSON object a line, one line a step, also across crashes and resumes."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self


class Metrics(NamedTuple):
    """What a metrics file holds.

    Attributes:
        records: The complete lines, in order.
        torn: The last line's text when it was cut short by a crash, else None.
    """

    records: list[dict[str, Any]]
    torn: str | None


class MetricsLog:
    """Appends to a metrics file; every line is flushed to the system when it is written.

    Args:
        path: The file; made, with its directory, when missing.
        resume_step: Number of steps that are complete when the run resumes (the checkpoint's). Lines of later steps
            (``step >= resume_step``, counted from 0) were written by a run that died before it could save them; they
            are dropped, because those steps are made again. 0 starts afresh.

    Raises:
        ValueError: The file exists and a line before its last is not a JSON object.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int = 0) -> None:
        if resume_step < 0:
            raise ValueError(f"resume_step must be at least 0, got {resume_step}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep = _length_before(self.path, resume_step) if self.path.exists() else 0
        self._file: IO[bytes] = self.path.open("ab")
        self._file.truncate(keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Args:
            record: JSON values; numbers with ``.item()`` (numpy's and torch's scalars) are converted, and NaN and
                infinities become the strings ``"nan"``, ``"inf"`` and ``"-inf"``, since JSON has none. ``step``, an
                integer, is required.

        Raises:
            ValueError: ``step`` is missing, or a value is not JSON.
        """
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"a metrics record needs an integer 'step', got {step!r}")
        line = json.dumps({str(key): _plain(value, str(key)) for key, value in record.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Sync the file to disk and close it; a second call does nothing."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> Metrics:
    """Read a metrics file, also one whose writer was killed in the middle of its last line.

    Raises:
        ValueError: The file is missing, or a line before the last is not a JSON object; the line is named.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such metrics file") from None
    lines = data.split(b"\n")
    rest = lines.pop()
    records = [_parse(line, file, number) for number, line in enumerate(lines, 1)]
    return Metrics(records, rest.decode(errors="replace") if rest else None)


def _length_before(path: Path, step: int) -> int:
    """Bytes of the file up to the first line of step ``step`` or later, or to a torn last line."""
    length = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") or _parse(line, path, number)["step"] >= step:
                break
            length += len(line)
    return length


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{path}, line {number}: not a metrics record (no integer 'step')")
    return record


def _plain(value: Any, place: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{place}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{place}.{index}") for index, entry in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item(), place)
    raise ValueError(f"metrics record: {place} holds a {type(value).__name__}, which JSON has no form for")
