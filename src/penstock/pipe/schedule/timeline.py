"""When each action of a schedule starts and ends."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from penstock.pipe.schedule.action import Action
from penstock.pipe.schedule.rounds import FloatArray
from penstock.pipe.schedule.schedule import Schedule


class Event(NamedTuple):
    """One action on one rank, from ``start`` to ``end``."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule in time, predicted or measured.

    Attributes:
        schedule: The schedule.
        starts: For each rank, ``float64``, when each of its actions starts, in the schedule's order.
        ends: For each rank, ``float64``, when each of its actions ends.
        unit: Of the times, such as ``"s"``; empty where it is whatever the costs were given in.
    """

    schedule: Schedule
    starts: tuple[FloatArray, ...]
    ends: tuple[FloatArray, ...]
    unit: str = ""

    def events(self) -> Iterator[Event]:
        """Every action, rank by rank, each rank's in order."""
        for rank, actions in enumerate(self.schedule.ranks):
            for action, start, end in zip(actions, self.starts[rank].tolist(), self.ends[rank].tolist(), strict=True):
                yield Event(rank, action, start, end)

    @property
    def makespan(self) -> float:
        """From time 0 to the end of the last action."""
        return max((float(ends[-1]) for ends in self.ends if len(ends)), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """For each rank, the time it computes."""
        return tuple(float(np.sum(e - s)) for s, e in zip(self.starts, self.ends, strict=True))

    @property
    def spans(self) -> tuple[float, ...]:
        """For each rank, the time from its first action's start to its last one's end."""
        return tuple(float(e[-1] - s[0]) if len(e) else 0.0 for s, e in zip(self.starts, self.ends, strict=True))

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time over the whole makespan."""
        total = self.makespan * self.schedule.num_ranks
        return 1.0 - sum(self.busy) / total if total > 0 else 0.0

    @property
    def span_bubble_fraction(self) -> float:
        """Idle share of the longest span of a rank: steps that follow one another without a barrier overlap outside it.

        This is the bubble of Qi et al., "Zero Bubble Pipeline Parallelism" (ICLR 2024).
        """
        spans, busy = self.spans, self.busy
        longest = max(range(len(spans)), key=spans.__getitem__)
        return 1.0 - busy[longest] / spans[longest] if spans[longest] > 0 else 0.0

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """For each rank, as :meth:`Schedule.peak_activations` counts."""
        return self.schedule.peak_activations()
