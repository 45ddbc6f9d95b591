"""Timelines for trace viewers: Perfetto, chrome://tracing."""

import os
from typing import Any

from penstock._core.files import write_json
from penstock.pipe.schedule.timeline import Timeline


def trace_events(timeline: Timeline, *, seconds_per_unit: float = 1.0) -> dict[str, Any]:
    """The timeline in the Trace Event Format: a track for each rank, an event for each action.

    Args:
        timeline: The timeline.
        seconds_per_unit: How long the timeline's unit is; the format counts microseconds.
    """
    schedule = timeline.schedule
    scale = 1e6 * seconds_per_unit
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": f"pipeline {schedule.name}"}}
    ]
    for rank in range(schedule.num_ranks):
        stages = ", ".join(map(str, schedule.stages_of(rank)))
        label = f"rank {rank} (stage {stages})"
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": label}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": rank, "args": {"sort_index": rank}})
    for rank, action, start, end in timeline.events():
        events.append(
            {
                "ph": "X",
                "name": str(action),
                "cat": action.op,
                "pid": 0,
                "tid": rank,
                "ts": start * scale,
                "dur": (end - start) * scale,
                "args": {"stage": action.stage, "micro_batch": action.micro_batch},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def save_trace(timeline: Timeline, path: str | os.PathLike[str], *, seconds_per_unit: float = 1.0) -> None:
    """Write :func:`trace_events` to a JSON file, atomically."""
    write_json(path, trace_events(timeline, seconds_per_unit=seconds_per_unit))
