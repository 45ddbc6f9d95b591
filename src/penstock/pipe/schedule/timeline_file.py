"""Timelines as files, predicted and measured ones alike."""

import os
from typing import Any, Final

import numpy as np

from penstock._core.files import read_json, write_json
from penstock.pipe.schedule.action import Action
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.schedule_file import check_head, checked_format, head_of, read_head
from penstock.pipe.schedule.timeline import Timeline

FORMAT: Final = "penstock.timeline"
VERSION: Final = 1
COLUMNS: Final = ("rank", "stage", "op", "micro_batch", "start", "end")


def timeline_to_json(timeline: Timeline) -> dict[str, Any]:
    """A timeline as a JSON object: a row of :data:`COLUMNS` for every action, each rank's in order."""
    events = [
        [rank, stage, op, micro_batch, start, end] for rank, (stage, op, micro_batch), start, end in timeline.events()
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "unit": timeline.unit,
        "schedule": head_of(timeline.schedule),
        "columns": list(COLUMNS),
        "events": events,
    }


def timeline_from_json(value: Any, where: object = "timeline") -> Timeline:
    """Read :func:`timeline_to_json`'s object.

    Args:
        value: The object.
        where: What to name in errors, such as the file.

    Raises:
        ScheduleError: It is no timeline, or its parts contradict one another.
    """
    value = checked_format(value, FORMAT, VERSION, where)
    head = value.get("schedule")
    if not isinstance(head, dict) or not isinstance(value.get("unit"), str) or value.get("columns") != list(COLUMNS):
        raise ScheduleError(f"{where}: needs a 'unit', a 'schedule' and the 'columns' {', '.join(COLUMNS)}")
    head = read_head(head, where)
    ranks: list[list[Action]] = [[] for _ in range(len(set(head["placement"])))]
    times: list[list[tuple[float, float]]] = [[] for _ in ranks]
    events = value.get("events")
    for row in events if isinstance(events, list) else [None]:
        rank, action, span = _event(row, where)
        if rank >= len(ranks):
            raise ScheduleError(f"{where}: event {row} is on rank {rank}, but stages are placed on {len(ranks)} ranks")
        ranks[rank].append(action)
        times[rank].append(span)
    try:
        schedule = Schedule.from_ranks(ranks, head["name"], slices=head["slices"])
        check_head(schedule, head)
        spans = [np.array(spans, dtype=np.float64).reshape(-1, 2) for spans in times]
        return Timeline(
            schedule,
            tuple(span[:, 0].copy() for span in spans),
            tuple(span[:, 1].copy() for span in spans),
            value["unit"],
        )
    except ValueError as error:
        raise ScheduleError(f"{where}: {error}") from error


def save_timeline(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline to a JSON file, atomically."""
    write_json(path, timeline_to_json(timeline))


def load_timeline(path: str | os.PathLike[str]) -> Timeline:
    """Read a timeline's JSON file; errors as for :func:`timeline_from_json` and ``read_json``."""
    return timeline_from_json(read_json(path), path)


def _event(row: Any, where: object) -> tuple[int, Action, tuple[float, float]]:
    if isinstance(row, list) and len(row) == len(COLUMNS):
        rank, stage, op, micro_batch, start, end = row
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (rank, stage, micro_batch))
        timed = all(isinstance(t, int | float) and not isinstance(t, bool) for t in (start, end))
        if whole and timed and isinstance(op, str) and -np.inf < start <= end < np.inf:
            return rank, Action(stage, op, micro_batch), (start, end)
    raise ScheduleError(f"{where}: {row!r} is not an event of {', '.join(COLUMNS)} with start <= end")
