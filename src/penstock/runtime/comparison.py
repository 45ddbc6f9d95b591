"""``penstock plan --compare``: what was predicted of a run beside what was recorded of it."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock._core.files import read_json
from penstock.pipe.planner import Prediction, Profile, predict
from penstock.pipe.planner.report import table
from penstock.pipe.schedule import Timeline, load_timeline
from penstock.runtime.config import TrainConfig, load_config
from penstock.runtime.run_directory import CONFIG_NAME, LAYOUT_NAME, TIMELINES_NAME


@dataclass(frozen=True)
class Recording:
    """The recorded steps of a run.

    Attributes:
        config: The run's configuration.
        bounds: Of its stages.
        interval: Layers recomputed together; 0 forms no groups.
        recomputed: Without groups, the layers that were recomputed, each by itself.
        micro_batch_size: Rows.
        timelines: Of the recorded steps.
        seconds: Of each whole step, on the slowest rank.
    """

    config: TrainConfig
    bounds: tuple[int, ...]
    interval: int
    recomputed: tuple[int, ...]
    micro_batch_size: int
    timelines: tuple[Timeline, ...]
    seconds: tuple[float, ...]


def read_recording(run: Path) -> Recording:
    """What a run with ``pipe.record_timeline`` left in its directory.

    Raises:
        ValueError: Nothing was recorded there.
    """
    folder = run / TIMELINES_NAME
    if not (run / CONFIG_NAME).is_file() or not (folder / LAYOUT_NAME).is_file():
        raise ValueError(f"{run}: holds no recorded steps; train with --set pipe.record_timeline=5 first")
    layout = read_json(folder / LAYOUT_NAME)
    steps = sorted(layout["seconds"], key=int)
    return Recording(
        config=load_config(run / CONFIG_NAME),
        bounds=tuple(layout["bounds"]),
        interval=layout["activation_checkpoint_interval"],
        recomputed=tuple(layout.get("activation_checkpoint_layers", ())),
        micro_batch_size=layout["micro_batch_size"],
        timelines=tuple(load_timeline(folder / f"step_{int(step):08d}.json") for step in steps),
        seconds=tuple(float(layout["seconds"][step]) for step in steps),
    )


def prediction_of(recording: Recording, profiles: Sequence[Profile]) -> Prediction:
    """What the planner says of the recorded layout.

    Raises:
        ValueError: The profiles are of another model or of other micro-batches.
    """
    layers = recording.bounds[-1]
    for profile in profiles:
        if profile.micro_batch_size == recording.micro_batch_size and len(profile.layers) == layers:
            schedule = recording.timelines[0].schedule
            return predict(profile, schedule, recording.bounds, recording.interval, recording.recomputed)
    sizes = ", ".join(f"{len(p.layers)} layers in micro-batches of {p.micro_batch_size}" for p in profiles)
    raise ValueError(
        f"the run has {layers} layers in micro-batches of {recording.micro_batch_size}, the profile is of {sizes}; "
        "measure again (leave --profile out)"
    )


def comparison_lines(predicted: Prediction, recording: Recording) -> Iterator[str]:
    """The two side by side; measured values are medians over the recorded steps."""
    measured, found = recording.timelines, predicted.timeline
    rows = [
        _row("step ms", 1e3 * predicted.seconds, [1e3 * s for s in recording.seconds]),
        _row("passes ms", 1e3 * found.makespan, [1e3 * t.makespan for t in measured]),
        _row("bubble %", 100 * predicted.bubble, [100 * t.bubble_fraction for t in measured]),
    ]
    for rank, busy in enumerate(found.busy):
        rows.append(_row(f"rank {rank} computes ms", 1e3 * busy, [1e3 * t.busy[rank] for t in measured]))
    durations = [op_medians(timeline) for timeline in measured]
    for (stage, op), seconds in sorted(op_medians(found).items()):
        rows.append(_row(f"stage {stage}, {op} ms", 1e3 * seconds, [1e3 * each[stage, op] for each in durations]))
    yield from table([("", "predicted", "measured", "predicted / measured"), *rows])
    yield f"measured: medians of {len(measured)} steps of {found.schedule.name}"


def op_medians(timeline: Timeline) -> dict[tuple[int, str], float]:
    """For each stage and op, the median duration of its actions."""
    seconds: dict[tuple[int, str], list[float]] = {}
    for _, action, start, end in timeline.events():
        seconds.setdefault((action.stage, action.op), []).append(end - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def _row(name: str, predicted: float, measured: Sequence[float]) -> tuple[str, ...]:
    median = statistics.median(measured)
    ratio = f"{predicted / median:.2f}" if median > 0 else ""
    return name, f"{predicted:.2f}", f"{median:.2f}", ratio
