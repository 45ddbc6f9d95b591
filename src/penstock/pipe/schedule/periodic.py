"""Lists of actions that repeat with a period: what most pipeline schedules are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.pipe.schedule.actions import Actions

IntArray = npt.NDArray[np.int32]


class Column(NamedTuple):
    """One op of a repeating row.

    Attributes:
        op: Its code, see :data:`~penstock.pipe.schedule.actions.OP_NAMES`.
        delay: Rows by which it lags: row ``j`` has the op's turn number ``j - delay``, where there is one.
        stages: The stage of every turn, or one for all.
        units: The micro-batch of every turn.
    """

    op: int
    delay: int
    stages: IntArray | int
    units: IntArray


def periodic(columns: Sequence[Column]) -> Actions:
    """The actions of rows that hold each column's op once, in the columns' order, each column delayed by its own.

    Turns before a column's first and after its last are left out, which gives the warm-up and the cool-down::

        columns F (delay 0) and B (delay 2), 4 micro-batches:

            row 0 | F0
            row 1 | F1
            row 2 | F2 B0
            row 3 | F3 B1
            row 4 |    B2
            row 5 |    B3      read row by row: F0 F1 F2 B0 F3 B1 B2 B3
    """
    first = min(column.delay for column in columns)
    rows = max(column.delay + len(column.units) for column in columns) - first
    shape = (rows, len(columns))
    taken = np.zeros(shape, dtype=np.bool_)
    stages, units = np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.int32)
    for at, column in enumerate(columns):
        span = slice(column.delay - first, column.delay - first + len(column.units))
        taken[span, at] = True
        stages[span, at] = column.stages
        units[span, at] = column.units
    ops = np.broadcast_to(np.array([column.op for column in columns], dtype=np.uint8), shape)
    return Actions(stages[taken], ops[taken], units[taken])
