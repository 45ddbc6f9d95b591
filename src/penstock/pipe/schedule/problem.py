"""What a schedule is searched for."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.pipe.schedule.action import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from penstock.pipe.schedule.costs import Costs, PerStage, per_stage
from penstock.pipe.schedule.memory import peak_memory
from penstock.pipe.schedule.schedule import Schedule, ScheduleError, check_sizes


@dataclass(frozen=True)
class Problem:
    """Stages on ranks, micro-batches, what everything costs, and how much a rank may keep.

    Attributes:
        placement: For each stage, the pipeline rank that holds it.
        micro_batches: Micro-batches per step.
        costs: Durations.
        memory: What the activations of a rank may take at a time, in the unit of ``activations``: one number for all
            ranks or one for each; None is no limit.
        activations: What one micro-batch of a stage takes from its F to the end of its W (or B). With 1, ``memory``
            counts micro-batches, once for each stage of the rank; with bytes, bytes.
        split: Whether backward passes may be split in two, I and W.
        table: For each op, its duration in each stage.
        lags: For each pair of neighbouring stages, how long a value travels: 0 within a rank.
        weights: For each stage, its activations.
        limits: For each rank, its memory; None is no limit.
    """

    placement: tuple[int, ...]
    micro_batches: int
    costs: Costs = field(default_factory=Costs)
    memory: float | Sequence[float] | None = None
    activations: PerStage = 1.0
    split: bool = True
    table: dict[str, list[float]] = field(init=False)
    lags: list[float] = field(init=False)
    weights: list[float] = field(init=False)
    limits: tuple[float, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        check_sizes(len(self.placement), self.micro_batches)
        if set(self.placement) != set(range(self.ranks)):
            raise ScheduleError(f"a placement must use every rank from 0 on, got {tuple(self.placement)}")
        pairs = zip(self.placement, self.placement[1:], self.costs.transfers(len(self.placement)), strict=False)
        derived = {
            "placement": tuple(self.placement),
            "table": self.costs.table(len(self.placement)),
            "lags": [transfer if here != there else 0.0 for here, there, transfer in pairs],
            "weights": per_stage("activations", self.activations, len(self.placement)),
            "limits": self._limits(),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        self._check_memory()

    def _limits(self) -> tuple[float, ...] | None:
        if self.memory is None:
            return None
        limits = tuple(self.memory) if isinstance(self.memory, Sequence) else (self.memory,) * self.ranks
        if len(limits) != self.ranks:
            raise ScheduleError(f"memory is given for {len(limits)} ranks, the placement has {self.ranks}")
        return limits

    def _check_memory(self) -> None:
        for rank, memory in enumerate(self.limits or ()):
            least = sum(weight for weight, holder in zip(self.weights, self.placement, strict=True) if holder == rank)
            if not least <= memory:
                raise ScheduleError(
                    f"one micro-batch alone keeps {least:g} on rank {rank}, the memory is {memory:g}; allow at least "
                    f"{least:g}, use smaller micro-batches or more ranks"
                )

    @property
    def ranks(self) -> int:
        """Pipeline ranks."""
        return max(self.placement) + 1

    @property
    def ops(self) -> tuple[str, ...]:
        """What is done to each micro-batch in each stage."""
        return (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT) if self.split else (FORWARD, BACKWARD)

    def fits(self, schedule: Schedule) -> bool:
        """Whether a schedule's activations fit in the memory."""
        # Sums of the same numbers in another order may differ in the last bits.
        limits = self.limits
        return limits is None or all(
            peak <= limit * (1 + 1e-9) for peak, limit in zip(peak_memory(schedule, self.weights), limits, strict=True)
        )

    def bound(self) -> float:
        """No schedule can be shorter: each rank's work, and the way of a micro-batch to it and back from it."""
        forward, last = self.table[FORWARD], len(self.placement) - 1
        whole, halves = self.table[BACKWARD], (self.table[INPUT_GRADIENT], self.table[WEIGHT_GRADIENT])
        # With a choice, the gradient is there after a B or an I, and the whole is done after a B or both halves.
        back = [min(b, i) if self.split else b for b, i in zip(whole, halves[0], strict=True)]
        done = [min(b, i + w) if self.split else b for b, i, w in zip(whole, *halves, strict=True)]
        to_here = np.cumsum([0.0, *(f + lag for f, lag in zip(forward, self.lags, strict=False))])
        from_here = np.cumsum([0.0, *(b + lag for b, lag in zip(back, self.lags, strict=False))])
        bounds = [float(to_here[last] + forward[last] + back[last] + from_here[last])]
        for rank in range(self.ranks):
            stages = [stage for stage, holder in enumerate(self.placement) if holder == rank]
            work = self.micro_batches * sum(forward[stage] + done[stage] for stage in stages)
            # A rank may end with weight gradients, for which nobody waits.
            after = 0.0 if self.split else float(min(from_here[stage] for stage in stages))
            bounds.append(float(min(to_here[stage] for stage in stages)) + work + after)
        return max(bounds)

    @property
    def halves_cost_no_more(self) -> bool:
        """Whether I and W together never take longer than B, so that nothing is lost by splitting every pass."""
        parts = zip(self.table[INPUT_GRADIENT], self.table[WEIGHT_GRADIENT], self.table[BACKWARD], strict=True)
        return all(i + w <= b * (1 + 1e-12) for i, w, b in parts)
