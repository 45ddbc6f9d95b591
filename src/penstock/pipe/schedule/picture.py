"""Timelines as pictures: SVG, and an HTML page around it. Both stand alone."""

import math
from collections.abc import Iterator
from html import escape
from typing import Final

from penstock.pipe.schedule.action import Action
from penstock.pipe.schedule.schedule import ScheduleError
from penstock.pipe.schedule.timeline import Timeline

MOST_ACTIONS: Final = 20_000
"""A picture of more would be unreadable and heavy."""
FILLS: Final = {
    "F": ("#4e79a7", "#7ba3cc"),
    "B": ("#e15759", "#f0888a"),
    "I": ("#f28e2b", "#f7b36f"),
    "W": ("#59a14f", "#8cc484"),
}
"""Fill colours by op, for the even and the odd chunks of a rank."""
OP_WORDS: Final = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
ROW, GAP, LEFT, TOP, LETTER = 26, 4, 64, 34, 6.5
"""Pixels: the height of a row, between rows, beside and above them, and of a letter."""
_TICKS: Final = 10


def svg(timeline: Timeline, *, width: int = 1200) -> str:
    """A drawing to scale: a row for each rank, a box for each action; names in the boxes that are wide enough.

    Pointing at a box shows its action and times.

    Args:
        timeline: The timeline.
        width: In pixels; at least 200.

    Raises:
        ScheduleError: More than :data:`MOST_ACTIONS` actions, or too narrow.
    """
    schedule = timeline.schedule
    height, scale = extent(timeline, width)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_legend(timeline),
        *_axis(timeline, scale, height),
    ]
    for rank in range(schedule.num_ranks):
        top = TOP + rank * (ROW + GAP)
        parts.append(f'<text x="4" y="{top + ROW / 2 + 4}">rank {rank}</text>')
        parts.append(
            f'<rect x="{LEFT}" y="{top}" width="{timeline.makespan * scale:.2f}" height="{ROW}" fill="#f0f0f0"/>'
        )
    for rank, action, start, end in timeline.events():
        parts += _box(timeline, rank, action, start, end, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


def extent(timeline: Timeline, width: int) -> tuple[int, float]:
    """The height of a picture in pixels, and its pixels per unit of time; errors as for :func:`svg`."""
    schedule = timeline.schedule
    if width < 200:
        raise ScheduleError(f"a picture needs a width of at least 200 pixels, got {width}")
    if schedule.num_actions > MOST_ACTIONS:
        raise ScheduleError(
            f"schedule {schedule.name!r} has {schedule.num_actions} actions, a picture shows at most {MOST_ACTIONS}; "
            "draw fewer micro-batches, or save a trace"
        )
    return TOP + schedule.num_ranks * (ROW + GAP) + 26, (width - LEFT - 8) / (timeline.makespan or 1.0)


def html(timeline: Timeline, *, width: int = 1200) -> str:
    """A page with the drawing and its numbers; errors as for :func:`svg`."""
    schedule = timeline.schedule
    title = escape(f"{schedule.name}: {schedule.num_stages} stages, {schedule.micro_batches} micro-batches")
    unit = f" {escape(timeline.unit)}" if timeline.unit else ""
    facts = {
        "makespan": f"{timeline.makespan:g}{unit}",
        "bubble, of the makespan": f"{timeline.bubble_fraction:.4f}",
        "bubble, of the longest rank's span": f"{timeline.span_bubble_fraction:.4f}",
        "peak activations, by rank": ", ".join(map(str, timeline.peak_activations)),
        "busy, by rank": ", ".join(f"{busy:g}" for busy in timeline.busy) + unit,
    }
    rows = "\n".join(f"<tr><th>{escape(name)}</th><td>{value}</td></tr>" for name, value in facts.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>\n'
        "body { font-family: sans-serif; margin: 1.5em; }\n"
        ".drawing { overflow-x: auto; }\n"
        "th { text-align: left; font-weight: normal; color: #555; padding-right: 1.5em; }\n"
        f"</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'<div class="drawing">\n{svg(timeline, width=width)}</div>\n<table>\n{rows}\n</table>\n</body>\n</html>\n'
    )


def _box(timeline: Timeline, rank: int, action: Action, start: float, end: float, scale: float) -> Iterator[str]:
    top = TOP + rank * (ROW + GAP)
    wide = (end - start) * scale
    yield (
        f'<rect x="{LEFT + start * scale:.2f}" y="{top}" width="{wide:.2f}" height="{ROW}" '
        f'fill="{fill_of(timeline, action)}" stroke="#ffffff" stroke-width="0.5">'
        f"<title>{action}: {start:g} to {end:g}</title></rect>"
    )
    label = label_of(timeline, action, wide)
    if label:
        yield (
            f'<text x="{LEFT + (start + end) / 2 * scale:.2f}" y="{top + ROW / 2 + 4}" text-anchor="middle" '
            f'fill="#ffffff" pointer-events="none">{label}</text>'
        )


def fill_of(timeline: Timeline, action: Action) -> str:
    """The colour of an action's box."""
    return FILLS[action.op][(action.stage // timeline.schedule.num_ranks) % 2]


def label_of(timeline: Timeline, action: Action, wide: float) -> str:
    """What is written in a box so many pixels wide; nothing where there is no room."""
    several = timeline.schedule.num_stages > timeline.schedule.num_ranks
    label = f"{action.stage if several else ''}{action.op}{action.micro_batch}"
    return label if wide >= len(label) * LETTER + 2 else ""


def legend(timeline: Timeline) -> Iterator[tuple[int, str, str]]:
    """For every op that occurs: where its entry is from left, its colour and its name."""
    at = LEFT
    used = {action.op for action in _first_actions(timeline)}
    for op, name in OP_WORDS.items():
        if op in used:
            yield at, FILLS[op][0], f"{op}: {name}"
            at += 40 + int(len(name) * LETTER) + 14


def _legend(timeline: Timeline) -> Iterator[str]:
    for at, fill, text in legend(timeline):
        yield f'<rect x="{at}" y="8" width="14" height="14" fill="{fill}"/>'
        yield f'<text x="{at + 19}" y="19">{text}</text>'


def _first_actions(timeline: Timeline) -> Iterator[Action]:
    """One action of every op that occurs."""
    for actions in timeline.schedule.ranks:
        yield from {action.op: action for action in actions}.values()


def ticks(timeline: Timeline) -> Iterator[float]:
    """Round times for the axis."""
    rough = (timeline.makespan or 1.0) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    for tick in range(int(timeline.makespan / step) + 1):
        yield tick * step


def _axis(timeline: Timeline, scale: float, height: int) -> Iterator[str]:
    for tick in ticks(timeline):
        x = LEFT + tick * scale
        yield f'<line x1="{x:.2f}" y1="{TOP - 4}" x2="{x:.2f}" y2="{height - 20}" stroke="#dddddd"/>'
        yield f'<text x="{x:.2f}" y="{height - 6}" text-anchor="middle" fill="#555555">{tick:g}</text>'
