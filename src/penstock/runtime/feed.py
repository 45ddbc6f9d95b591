"""What each step reads: positions of the order by micro-batch, the same on every rank."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.data_sampling.token_budget import StepPlan, TokenBudget
from penstock.runtime.batch_sizes import BatchSizes
from penstock.runtime.sequence_lengths import SequenceLengths

Collate = Callable[[list[Any]], tuple[Any, Any]]

_POWERS: Final = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch of a step.

    Attributes:
        positions: Of its rows in the order; int64.
        first: How many samples the run has consumed before its first row.
        weight: Its share of the loss relative to its siblings'; 0 where it repeats rows of another one.
    """

    positions: npt.NDArray[np.int64]
    first: int
    weight: float = 1.0


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        batches: All its micro-batches, over all replicas.
        samples: Samples that it consumes.
        number: The step.
        tokens: Tokens that it consumes where padding is not to count; None takes the elements of the inputs.
        shapes: Rows and tokens of the rows of each micro-batch, where they differ; None where all are alike.
        lr_factor: What the learning rate is multiplied by.
    """

    batches: tuple[PlannedBatch, ...]
    samples: int
    number: int = 0
    tokens: int | None = None
    shapes: tuple[tuple[int, int], ...] | None = None
    lr_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sequences of a micro-batch.

    Attributes:
        rows: How many.
        length: Tokens of each that reach the layers.
        plain_length: Tokens of each in the plain run.
    """

    rows: int
    length: int
    plain_length: int


@dataclass(frozen=True)
class Feed:
    """What the steps of a run read.

    Attributes:
        global_batch_size: Samples of a step, or where that changes, those that the learning rate is meant for.
        micro_batches: Micro-batches of a step, over all replicas.
        sizes: Changes of the number of samples.
        budget: Cuts steps by tokens instead.
        lengths: Changes of the sequence length.
        lr_scaling: ``none``, ``linear`` or ``sqrt``.
    """

    global_batch_size: int
    micro_batches: int
    sizes: BatchSizes | None = None
    budget: TokenBudget | None = None
    lengths: SequenceLengths | None = None
    lr_scaling: str = "none"

    def step(self, number: int, *, samples: int, tokens: int) -> Step:
        """The step of a run that has consumed so many samples and tokens."""
        if self.budget is not None:
            return self._budgeted(self.budget.step_at(samples), number, samples)
        size = self.global_batch_size if self.sizes is None else self.sizes.at(tokens)
        rows = size // self.micro_batches
        batches = tuple(
            PlannedBatch(np.arange(first, first + rows, dtype=np.int64), first)
            for first in range(samples, samples + size, rows)
        )
        return Step(batches, size, number, lr_factor=self._factor(size))

    @property
    def varies(self) -> bool:
        """Whether steps differ in samples, in tokens or in the length of their sequences."""
        return self.sizes is not None or self.budget is not None or self.lengths is not None

    def collate(self, collate: Collate, step: Step) -> Collate:
        """A collate function whose batches have the length of a step."""
        lengths = self.lengths
        if lengths is None:
            return collate

        def shaped(samples: list[Any]) -> tuple[Any, Any]:
            inputs, targets = collate(samples)
            return lengths.shaped(inputs, step.number), lengths.shaped(targets, step.number)

        return shaped

    def shapes(self, step: Step, tokens: int) -> tuple[Shape, ...]:
        """What each micro-batch of a step that consumed so many tokens had the layers compute."""
        if step.shapes is not None:
            return tuple(Shape(rows, width, width) for rows, width in step.shapes)
        count = len(step.batches)
        rows = step.samples // count
        if self.lengths is None:
            length = tokens // step.samples
            return (Shape(rows, length, length),) * count
        computed = self.lengths.rows(rows, step.number)
        length = tokens // (computed * count)
        return (Shape(computed, length, length if self.lengths.reshape else self.lengths.full),) * count

    def positions(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The positions in the order of the samples that a run consumes as its ``start``-th to ``stop - 1``-th."""
        if self.budget is None:
            return np.arange(start, stop, dtype=np.int64)
        return self.budget.positions(start, stop)

    def _budgeted(self, plan: StepPlan, number: int, samples: int) -> Step:
        counted = [0 if batch.repeats else len(batch.positions) for batch in plan.micro_batches]
        firsts = accumulate(counted[:-1], initial=samples)
        total = plan.tokens
        batches = tuple(
            PlannedBatch(
                batch.positions, first, 0.0 if batch.repeats else batch.tokens * len(plan.micro_batches) / total
            )
            for batch, first in zip(plan.micro_batches, firsts, strict=True)
        )
        shapes = tuple((len(batch.positions), batch.width) for batch in plan.micro_batches)
        return Step(batches, plan.samples, number, total, shapes, self._factor(plan.samples))

    def _factor(self, samples: int) -> float:
        return float((samples / self.global_batch_size) ** _POWERS[self.lr_scaling])
