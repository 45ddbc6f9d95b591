"""Timelines as PNG pictures; needs matplotlib."""

import io
from typing import Any

from penstock.pipe.schedule.picture import GAP, LEFT, ROW, TOP, extent, fill_of, label_of, legend, ticks
from penstock.pipe.schedule.timeline import Timeline

_DOTS_PER_INCH = 100
_POINTS = 72 / _DOTS_PER_INCH  # per pixel


def png(timeline: Timeline, *, width: int = 1200) -> bytes:
    """The drawing of :func:`~penstock.pipe.schedule.svg` in pixels.

    Args:
        timeline: The timeline.
        width: In pixels; at least 200.

    Raises:
        ScheduleError: More actions than a picture shows, or too narrow.
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a PNG needs matplotlib: pip install 'penstock[report]'; or write an SVG") from None
    height, scale = extent(timeline, width)
    figure = Figure(figsize=(width / _DOTS_PER_INCH, height / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))  # one unit is one pixel, from above as in the SVG
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()

    def write(x: float, y: float, text: str, **how: Any) -> None:
        axes.text(x, y, text, fontsize=10 * _POINTS, va="center", **how)

    boxes, fills = [], []

    def box(x: float, y: float, wide: float, high: float, fill: str) -> None:
        boxes.append([(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)])
        fills.append(fill)

    for at, fill, text in legend(timeline):
        box(at, 8, 14, 14, fill)
        write(at + 19, 15, text)
    for tick in ticks(timeline):
        x = LEFT + tick * scale
        axes.plot([x, x], [TOP - 4, height - 20], color="#dddddd", linewidth=_POINTS, zorder=0)
        write(x, height - 10, f"{tick:g}", ha="center", color="#555555")
    for rank in range(timeline.schedule.num_ranks):
        top = TOP + rank * (ROW + GAP)
        write(4, top + ROW / 2, f"rank {rank}")
        box(LEFT, top, timeline.makespan * scale, ROW, "#f0f0f0")
    for rank, action, start, end in timeline.events():
        top, wide = TOP + rank * (ROW + GAP), (end - start) * scale
        box(LEFT + start * scale, top, wide, ROW, fill_of(timeline, action))
        label = label_of(timeline, action, wide)
        if label:
            write(LEFT + (start + end) / 2 * scale, top + ROW / 2, label, ha="center", color="#ffffff")
    edges = [fill if fill == "#f0f0f0" else "#ffffff" for fill in fills]
    axes.add_collection(PolyCollection(boxes, facecolors=fills, edgecolors=edges, linewidths=0.5 * _POINTS, zorder=1))
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
