"""Profiles and plans as text."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from penstock.pipe.planner.plan import Plan
from penstock.pipe.planner.predict import Prediction
from penstock.pipe.planner.profile import Profile

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def layer_lines(profile: Profile) -> Iterator[str]:
    """A table of the layers, and why weight gradients of some cannot wait."""
    rows: list[tuple[str, ...]] = [
        ("layer", "type", "F ms", "B ms", "I ms", "W ms", "kept", "output", "parameters", "state", "backward")
    ]
    for index, layer in enumerate(profile.layers):
        times = (layer.forward, layer.backward, layer.input_gradient, layer.weight_gradient)
        sizes = (layer.kept, layer.output, layer.parameters, layer.state)
        kind = "whole" if layer.whole else "splittable"
        rows.append((str(index), layer.name, *(f"{1e3 * t:.3f}" for t in times), *(size(b) for b in sizes), kind))
    yield from table(rows)
    for reason, layers in _reasons(profile).items():
        yield f"whole: layer {', '.join(map(str, layers))}: {reason}"
    yield (
        f"a message takes {1e6 * profile.latency:.0f} us and {1e9 * profile.seconds_per_byte:.3f} ns per byte; the "
        f"engine {1e6 * profile.action:.0f} us per action and {1e6 * profile.step:.0f} us per step; "
        f"measured with {profile.concurrent} process(es) computing at once"
    )


def plan_lines(plan: Plan, most: int = 10) -> Iterator[str]:
    """The fastest candidates, and the choice in detail."""
    rows: list[tuple[str, ...]] = [
        ("", "step ms", "bubble", "peak", "schedule", "stages/rank", "micro-batches", "recompute", "bounds")
    ]
    for number, found in enumerate(plan.predictions[:most], start=1):
        rows.append(
            (
                str(number),
                f"{1e3 * found.seconds:.2f}",
                f"{100 * found.bubble:.1f} %",
                size(max(found.memory)),
                found.schedule.name,
                str(found.chunks),
                f"{found.schedule.micro_batches} of {found.micro_batch_size}",
                recomputed(found),
                ",".join(map(str, found.bounds)),
            )
        )
    yield from table(rows)
    limit = "" if plan.memory is None else f"; {plan.too_large} do not fit in {size(plan.memory)} per rank"
    yield f"{len(plan.predictions)} candidates{limit}"
    yield from prediction_lines(plan.best)


def prediction_lines(found: Prediction) -> Iterator[str]:
    """One prediction in detail."""
    schedule = found.schedule
    yield (
        f"choice: {schedule.name}, {schedule.micro_batches} micro-batches of {found.micro_batch_size}, "
        f"recomputing {recomputed(found)}"
    )
    yield f"predicted step   {1e3 * found.seconds:.2f} ms, of which passes {1e3 * found.timeline.makespan:.2f} ms"
    yield f"predicted bubble {100 * found.bubble:.1f} % of the passes"
    ranges = list(pairwise(found.bounds))
    for rank, peak in enumerate(found.memory):
        stages = (ranges[stage] for stage in schedule.stages_of(rank))
        layers = " and ".join(f"{a} to {b - 1}" if b - a > 1 else str(a) for a, b in stages)
        yield f"rank {rank}: layers {layers}; computes {1e3 * found.timeline.busy[rank]:.2f} ms; peak {size(peak)}"


def recomputed(found: Prediction) -> str:
    """What is recomputed, in a few words."""
    if found.recomputed:
        return f"layers {ranges_of(found.recomputed)}"
    if found.interval == 0:
        return "nothing"
    return "every layer" if found.interval == 1 else f"groups of {found.interval}"


def ranges_of(numbers: Sequence[int]) -> str:
    """Rising numbers with their runs drawn together: ``1-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def size(count: float) -> str:
    """Bytes with a binary prefix: ``12.3 MiB``."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {_UNITS[power]}" if power == 0 else f"{count:.3g} {_UNITS[power]}"


def _reasons(profile: Profile) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(profile.layers):
        for reason in layer.whole:
            found.setdefault(reason, []).append(index)
    return found


def table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
