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
_FILLS: Final = {
    "F": ("#4e79a7", "#7ba3cc"),
    "B": ("#e15759", "#f0888a"),
    "I": ("#f28e2b", "#f7b36f"),
    "W": ("#59a14f", "#8cc484"),
}
"""Fill colours by op, for the even and the odd chunks of a rank."""
_NAMES: Final = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_ROW, _GAP, _LEFT, _TOP, _LETTER = 26, 4, 64, 34, 6.5
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
    if width < 200:
        raise ScheduleError(f"a picture needs a width of at least 200 pixels, got {width}")
    if schedule.num_actions > MOST_ACTIONS:
        raise ScheduleError(
            f"schedule {schedule.name!r} has {schedule.num_actions} actions, a picture shows at most {MOST_ACTIONS}; "
            "draw fewer micro-batches, or save a trace"
        )
    height = _TOP + schedule.num_ranks * (_ROW + _GAP) + 26
    scale = (width - _LEFT - 8) / (timeline.makespan or 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_legend(timeline),
        *_axis(timeline, scale, height),
    ]
    for rank in range(schedule.num_ranks):
        top = _TOP + rank * (_ROW + _GAP)
        parts.append(f'<text x="4" y="{top + _ROW / 2 + 4}">rank {rank}</text>')
        parts.append(
            f'<rect x="{_LEFT}" y="{top}" width="{timeline.makespan * scale:.2f}" height="{_ROW}" fill="#f0f0f0"/>'
        )
    for rank, action, start, end in timeline.events():
        parts += _box(timeline, rank, action, start, end, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


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
    schedule = timeline.schedule
    stage, op, micro_batch = action
    several = schedule.num_stages > schedule.num_ranks
    top = _TOP + rank * (_ROW + _GAP)
    wide = (end - start) * scale
    fill = _FILLS[op][(stage // schedule.num_ranks) % 2]
    yield (
        f'<rect x="{_LEFT + start * scale:.2f}" y="{top}" width="{wide:.2f}" height="{_ROW}" fill="{fill}" '
        f'stroke="#ffffff" stroke-width="0.5"><title>{action}: {start:g} to {end:g}</title></rect>'
    )
    label = f"{stage if several else ''}{op}{micro_batch}"
    if wide >= len(label) * _LETTER + 2:
        yield (
            f'<text x="{_LEFT + (start + end) / 2 * scale:.2f}" y="{top + _ROW / 2 + 4}" text-anchor="middle" '
            f'fill="#ffffff" pointer-events="none">{label}</text>'
        )


def _legend(timeline: Timeline) -> Iterator[str]:
    at = _LEFT
    used = {action.op for action in _first_actions(timeline)}
    for op, name in _NAMES.items():
        if op in used:
            yield f'<rect x="{at}" y="8" width="14" height="14" fill="{_FILLS[op][0]}"/>'
            yield f'<text x="{at + 19}" y="19">{op}: {name}</text>'
            at += 40 + int(len(name) * _LETTER) + 14


def _first_actions(timeline: Timeline) -> Iterator[Action]:
    """One action of every op that occurs."""
    for actions in timeline.schedule.ranks:
        yield from {action.op: action for action in actions}.values()


def _axis(timeline: Timeline, scale: float, height: int) -> Iterator[str]:
    rough = (timeline.makespan or 1.0) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    for tick in range(int(timeline.makespan / step) + 1):
        x = _LEFT + tick * step * scale
        yield f'<line x1="{x:.2f}" y1="{_TOP - 4}" x2="{x:.2f}" y2="{height - 20}" stroke="#dddddd"/>'
        yield f'<text x="{x:.2f}" y="{height - 6}" text-anchor="middle" fill="#555555">{tick * step:g}</text>'
