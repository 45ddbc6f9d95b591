"""Keeps the timelines of a run's first steps, in the form in which steps are predicted."""

import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from penstock._core.files import write_json
from penstock.pipe.schedule import Schedule, Timeline, save_timeline
from penstock.runtime.gather import gather_json
from penstock.runtime.parts import Parts
from penstock.runtime.run_directory import LAYOUT_NAME, TIMELINES_NAME

WARM_UP: Final = 2
"""Steps of a process that are not recorded: memory is fresh and connections are made."""


class TimelineRecorder:
    """Records steps of a run into its directory: one timeline for each step, and the layout that they are of.

    Every rank makes one and makes the same calls. Times are those of each machine's clock; the first replica's pipeline
    is what is written.

    Args:
        parts: Of the engine.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._left = parts.config.pipe.record_timeline
        self._warm_up = WARM_UP
        self._seconds: dict[str, float] = {}

    def begin(self) -> None:
        """Before a step."""
        if self._left and not self._warm_up:
            self._parts.pipeline.recorded = []

    def end(self, step: int, seconds: float) -> None:
        """After step number ``step``, which took so long on this rank. Collective where it was recorded."""
        spans, self._parts.pipeline.recorded = self._parts.pipeline.recorded, None
        if not self._left:
            return
        if self._warm_up:
            self._warm_up -= 1
            return
        assert spans is not None
        self._left -= 1
        parts = self._parts
        offset = time.time() - time.perf_counter()
        mine: dict[str, Any] = {
            "pipe": parts.groups.pipe_rank,
            "replica": parts.groups.replica,
            "seconds": seconds,
            "spans": [(start + offset, end + offset) for start, end in spans],
        }
        with parts.watcher.waiting("gathering a timeline"):
            found = gather_json(mine, group=parts.groups.control, meter=parts.meter)
        if parts.process.rank == 0:
            assert parts.config.output is not None
            folder = Path(parts.config.output) / TIMELINES_NAME
            folder.mkdir(parents=True, exist_ok=True)
            self._write_layout(folder / LAYOUT_NAME, step, max(entry["seconds"] for entry in found))
            # Where several ranks hold parts of the same layers, the lowest speaks for them.
            first = {int(e["pipe"]): e["spans"] for e in reversed(found) if e["replica"] == 0}
            timeline = timeline_of(parts.pipeline.schedule, [first[rank] for rank in sorted(first)])
            save_timeline(timeline, folder / f"step_{step:08d}.json")

    def _write_layout(self, path: Path, step: int, seconds: float) -> None:
        module = self._parts.module
        self._seconds[str(step)] = seconds
        layout = {
            "bounds": [0, 1] if module is None else list(module.bounds or ()),
            "activation_checkpoint_interval": 0 if module is None else module.activation_checkpoint_interval,
            "activation_checkpoint_layers": [] if module is None else sorted(module.recomputed),
            "micro_batch_size": self._parts.config.train.micro_batch_size,
            "seconds": self._seconds,
        }
        write_json(path, layout)


def timeline_of(schedule: Schedule, spans: list[list[tuple[float, float]]]) -> Timeline:
    """The timeline of measured actions, from the start of the first on.

    Args:
        schedule: What was run.
        spans: For each pipeline rank, start and end of its actions in the schedule's order, in seconds.
    """
    times = [np.array(rank, dtype=np.float64).reshape(-1, 2) for rank in spans]
    origin = min(float(rank[0, 0]) for rank in times if len(rank))
    return Timeline(schedule, tuple(t[:, 0] - origin for t in times), tuple(t[:, 1] - origin for t in times), "s")
