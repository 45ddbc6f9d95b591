"""What the actions of a schedule cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.pipe.schedule.action import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from penstock.pipe.schedule.schedule import ScheduleError

PerStage = float | Sequence[float]
"""One number for every stage, or one for each."""


@dataclass(frozen=True)
class Costs:
    """Durations, in any unit of time, of each op in each stage and of a message.

    Attributes:
        forward: F.
        input_gradient: I.
        weight_gradient: W.
        backward: B; None means I and W together.
        transfer: From the end of the action that makes a value to its arrival on another rank; where a sequence, one
            for each pair of neighbouring stages, the first between stages 0 and 1. Messages do not occupy the ranks.

    With sequence slices the durations are those of one slice.
    """

    forward: PerStage = 1.0
    input_gradient: PerStage = 1.0
    weight_gradient: PerStage = 1.0
    backward: PerStage | None = None
    transfer: PerStage = 0.0

    @classmethod
    def unit(cls) -> "Costs":
        """Every action takes one unit of time, a whole backward too: the cells of a schedule's drawing."""
        return cls(backward=1.0)

    def table(self, num_stages: int) -> dict[str, list[float]]:
        """For each compute op, its duration in each stage.

        Raises:
            ScheduleError: A sequence of another length, or a duration that is negative or not finite.
        """
        table = {
            op: per_stage(op, cost, num_stages)
            for op, cost in (
                (FORWARD, self.forward),
                (INPUT_GRADIENT, self.input_gradient),
                (WEIGHT_GRADIENT, self.weight_gradient),
            )
        }
        table[BACKWARD] = (
            [i + w for i, w in zip(table[INPUT_GRADIENT], table[WEIGHT_GRADIENT], strict=True)]
            if self.backward is None
            else per_stage(BACKWARD, self.backward, num_stages)
        )
        return table

    def transfers(self, num_stages: int) -> list[float]:
        """The transfer times between neighbouring stages, ``num_stages - 1`` of them; errors as for :meth:`table`."""
        pairs = num_stages - 1
        given = self.transfer
        values = [float(value) for value in given] if isinstance(given, Sequence) else [float(given)] * max(1, pairs)
        if isinstance(given, Sequence) and len(values) != pairs:
            raise ScheduleError(
                f"transfer times are given for {len(values)} pairs of neighbouring stages, the schedule has {pairs}"
            )
        for value in values:
            if not (value >= 0 and math.isfinite(value)):
                raise ScheduleError(f"the transfer time must be finite and not negative, got {value}")
        return values[:pairs]


def per_stage(op: str, cost: PerStage, num_stages: int) -> list[float]:
    """One number for each stage; errors as for :meth:`Costs.table`."""
    values = [float(value) for value in cost] if isinstance(cost, Sequence) else [float(cost)] * num_stages
    if len(values) != num_stages:
        raise ScheduleError(f"costs of {op} are given for {len(values)} stages, the schedule has {num_stages}")
    for stage, value in enumerate(values):
        if not (value >= 0 and math.isfinite(value)):
            raise ScheduleError(f"the cost of {op} in stage {stage} must be finite and not negative, got {value}")
    return values
