"""Draw a schedule as text."""

from collections.abc import Sequence
from typing import Final

from penstock.pipe.schedule.action import Action
from penstock.pipe.schedule.costs import Costs
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.simulate import simulate
from penstock.pipe.schedule.timeline import Timeline

_CELLS_PER_ACTION: Final = 8
"""Durations that differ more than this from the mean are rounded, so that the drawing stays of readable length."""


def draw(what: Schedule | Timeline, *, columns: int = 120, cell: float | None = None) -> str:
    """A table with a line for each rank and time from left to right.

    An action is named by op and micro-batch (``F3``), with the stage in front where ranks hold several (``2F3``). One
    that is longer than a cell is filled up with ``=``; blanks are idle time. A table wider than ``columns`` is broken
    into bands that follow one another in time.

    Args:
        what: A timeline, or a schedule, of which every action is drawn one cell wide.
        columns: Width to keep within, where one cell fits at all.
        cell: Duration of one cell, in the timeline's unit. By default that of the shortest action.

    Raises:
        ScheduleError: A cell of no duration, or columns below 1.
    """
    if columns < 1 or (cell is not None and not cell > 0):
        raise ScheduleError(f"a drawing needs at least 1 column and a cell above 0, got {columns} and {cell}")
    timeline = simulate(what, Costs.unit()) if isinstance(what, Schedule) else what
    schedule = timeline.schedule
    several = schedule.num_stages > schedule.num_ranks
    width = 1 + max((len(_label(a, several)) for actions in schedule.ranks for a in actions), default=0)
    size = cell or _default_cell(timeline)
    rows = [_row(timeline, rank, size, width, several) for rank in range(schedule.num_ranks)]
    heads = [f"rank {rank:>{len(str(schedule.num_ranks - 1))}} |" for rank in range(schedule.num_ranks)]
    return _in_bands(heads, rows, max(1, (columns - len(heads[0])) // width) * width)


def _label(action: Action, several: bool) -> str:
    stage, op, micro_batch = action
    return f"{stage if several else ''}{op}{micro_batch}"


def _default_cell(timeline: Timeline) -> float:
    shortest = min((event.end - event.start for event in timeline.events() if event.end > event.start), default=1.0)
    longest_list = max(map(len, timeline.starts))
    return max(shortest, timeline.makespan / (_CELLS_PER_ACTION * longest_list))


def _row(timeline: Timeline, rank: int, cell: float, width: int, several: bool) -> str:
    parts: list[str] = []
    column = 0
    for action, start, end in zip(
        timeline.schedule.ranks[rank], timeline.starts[rank], timeline.ends[rank], strict=True
    ):
        first = max(column, round(start / cell))
        stop = max(first + 1, round(end / cell))
        label = _label(action, several)
        fill = "=" if stop - first > 1 else " "
        parts.append(" " * (first - column) * width)
        parts.append(f"{label:{fill}<{(stop - first) * width - 1}} ")
        column = stop
    return "".join(parts)


def _in_bands(heads: Sequence[str], rows: Sequence[str], band: int) -> str:
    length = max(map(len, rows))
    bands = [
        "".join(f"{head} {row[start : start + band]}".rstrip() + "\n" for head, row in zip(heads, rows, strict=True))
        for start in range(0, length, band)
    ]
    return "\n".join(bands)
