"""Schedules as files that a run can name."""

import os
from collections.abc import Mapping
from typing import Any, Final

from penstock._core.files import read_json, write_json
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.validate import needed_capacity

FORMAT: Final = "penstock.schedule"
VERSION: Final = 1
SUFFIX: Final = ".json"
"""Where a schedule is named, a name that ends so is a file's."""


def save_schedule(schedule: Schedule, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
    """Write a schedule to a JSON file, atomically.

    Args:
        schedule: The schedule.
        path: The file; give it the suffix ``.json``, so that a run can name it.
        notes: What else to keep with it, such as the costs for which it was made; JSON values.
    """
    value = {
        "format": FORMAT,
        "version": VERSION,
        **head_of(schedule),
        "ranks": schedule.to_text().splitlines(),
        "notes": dict(notes or {}),
    }
    write_json(path, value)


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read a schedule, and prove that it can run.

    Raises:
        CorruptFileError: The file is missing or no JSON.
        ScheduleError: It is no schedule file, its parts contradict one another, or the schedule cannot run.
    """
    value = checked_format(read_json(path), FORMAT, VERSION, path)
    head = read_head(value, path)
    lines = value.get("ranks")
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ScheduleError(f"{path}: 'ranks' must list a line of actions for every rank")
    try:
        schedule = Schedule.from_text("\n".join(lines), head["name"], slices=head["slices"])
        check_head(schedule, head)
        needed_capacity(schedule)
    except ValueError as error:
        raise ScheduleError(f"{path}: {error}") from error
    return schedule


def head_of(schedule: Schedule) -> dict[str, Any]:
    """What a schedule is besides its actions, as JSON values."""
    return {
        "name": schedule.name,
        "micro_batches": schedule.micro_batches,
        "slices": schedule.slices,
        "placement": list(schedule.placement),
        "forward_only": schedule.forward_only,
    }


def read_head(value: Mapping[str, Any], path: object) -> dict[str, Any]:
    """:func:`head_of`'s entries out of a file's, each of its type."""
    kinds = {"name": str, "micro_batches": int, "slices": int, "placement": list, "forward_only": bool}
    for key, kind in kinds.items():
        found = value.get(key)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise ScheduleError(f"{path}: {key!r} must be of type {kind.__name__}, found {found!r}")
    if not all(type(rank) is int for rank in value["placement"]):
        raise ScheduleError(f"{path}: 'placement' must list a rank for every stage, found {value['placement']!r}")
    return {key: value[key] for key in kinds}


def check_head(schedule: Schedule, head: Mapping[str, Any]) -> None:
    """Refuse actions that contradict what stands beside them."""
    for key, found in head_of(schedule).items():
        if found != head[key]:
            raise ScheduleError(f"its actions make {key} {found!r}, the file says {head[key]!r}")


def checked_format(value: Any, kind: str, version: int, path: object) -> dict[str, Any]:
    """A JSON object of the given format and version."""
    if not isinstance(value, dict) or value.get("format") != kind:
        raise ScheduleError(f"{path}: not a {kind} file (its 'format' says otherwise)")
    if value.get("version") != version:
        raise ScheduleError(
            f"{path}: {kind} version {value.get('version')!r} is not known; this version of penstock reads {version}"
        )
    return value
