"""What each action of a schedule waits for, as arrays."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.pipe.schedule.actions import B_CODE, F_CODE, I_CODE, W_CODE
from penstock.pipe.schedule.schedule import Schedule

IntArray = npt.NDArray[np.int32]
NOTHING: Final = -1
"""In place of an action: there is none."""


@dataclass(frozen=True, slots=True)
class Graph:
    """The actions of all ranks in one row, rank after rank, and for each the one whose value it waits for.

    Attributes:
        first: ``int64[ranks + 1]``, where each rank's actions begin.
        stages: ``int32[n]``.
        ops: ``uint8[n]``.
        units: ``int32[n]``.
        done_at: For each of F, I and W (a B stands for both I and W): ``int32[stages * units]``, by
            ``stage * units + unit``, the action that does it, or :data:`NOTHING`.
        needs: ``int32[n]``, the action whose value this one takes: F that of the stage before, B and I the gradient
            of the stage after (the last stage its own F), W its own I. :data:`NOTHING` for the first stage's F, and
            where nobody makes the value.
    """

    first: npt.NDArray[np.int64]
    stages: IntArray
    ops: npt.NDArray[np.uint8]
    units: IntArray
    done_at: tuple[IntArray, IntArray, IntArray]
    needs: IntArray

    @classmethod
    def of(cls, schedule: Schedule) -> "Graph":
        """The graph of a schedule whose actions lie within its stages and units; otherwise it may be anything."""
        lists = schedule.ranks
        first = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(actions) for actions in lists], out=first[1:])
        stages = np.concatenate([actions.stages for actions in lists])
        ops = np.concatenate([actions.ops for actions in lists])
        units = np.concatenate([actions.units for actions in lists])
        width, size = schedule.units, schedule.units * schedule.num_stages
        cell = stages.astype(np.int64) * width + units
        by_op = [np.flatnonzero(ops == code).astype(np.int32) for code in (F_CODE, B_CODE, I_CODE, W_CODE)]
        forward, whole, inputs, weights = by_op
        done_at = tuple(np.full(size, NOTHING, dtype=np.int32) for _ in range(3))
        for table, parts in zip(done_at, ((forward,), (whole, inputs), (whole, weights)), strict=True):
            for actions in parts:
                table[cell[actions]] = actions
        needs = np.full(len(ops), NOTHING, dtype=np.int32)
        inner = forward[stages[forward] > 0]
        needs[inner] = done_at[0][cell[inner] - width]
        last = schedule.num_stages - 1
        for actions in (whole, inputs):
            here = cell[actions]
            at_end = stages[actions] == last
            needs[actions[at_end]] = done_at[0][here[at_end]]
            needs[actions[~at_end]] = done_at[1][here[~at_end] + width]
        needs[weights] = done_at[1][cell[weights]]
        return cls(first, stages, ops, units, (done_at[0], done_at[1], done_at[2]), needs)

    def ranks(self) -> IntArray:
        """``int32[n]``: each action's rank."""
        return np.repeat(np.arange(len(self.first) - 1, dtype=np.int32), np.diff(self.first))
