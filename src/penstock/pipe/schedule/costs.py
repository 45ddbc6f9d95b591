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
        transfer: From the end of the action that makes a value to its arrival on another rank. Messages do not occupy
            the ranks.
    """

    forward: PerStage = 1.0
    input_gradient: PerStage = 1.0
    weight_gradient: PerStage = 1.0
    backward: PerStage | None = None
    transfer: float = 0.0

    @classmethod
    def unit(cls) -> "Costs":
        """Every action takes one unit of time, a whole backward too: the cells of a schedule's drawing."""
        return cls(backward=1.0)

    def table(self, num_stages: int) -> dict[str, list[float]]:
        """For each compute op, its duration in each stage.

        Raises:
            ScheduleError: A sequence of another length, or a duration that is negative or not finite.
        """
        if not (self.transfer >= 0 and math.isfinite(self.transfer)):
            raise ScheduleError(f"the transfer time must be finite and not negative, got {self.transfer}")
        table = {
            op: _per_stage(op, cost, num_stages)
            for op, cost in (
                (FORWARD, self.forward),
                (INPUT_GRADIENT, self.input_gradient),
                (WEIGHT_GRADIENT, self.weight_gradient),
            )
        }
        table[BACKWARD] = (
            [i + w for i, w in zip(table[INPUT_GRADIENT], table[WEIGHT_GRADIENT], strict=True)]
            if self.backward is None
            else _per_stage(BACKWARD, self.backward, num_stages)
        )
        return table


def _per_stage(op: str, cost: PerStage, num_stages: int) -> list[float]:
    values = [float(value) for value in cost] if isinstance(cost, Sequence) else [float(cost)] * num_stages
    if len(values) != num_stages:
        raise ScheduleError(f"costs of {op} are given for {len(values)} stages, the schedule has {num_stages}")
    for stage, value in enumerate(values):
        if not (value >= 0 and math.isfinite(value)):
            raise ScheduleError(f"the cost of {op} in stage {stage} must be finite and not negative, got {value}")
    return values
