"""What one step is made of while it runs, and what it came to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from penstock.pipe.gradient_graph import Division
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.receiver import Received
from penstock.pipe.schedule import Action
from penstock.pipe.stage import Cut
from penstock.pipe.weight_work import WeightWork


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a training step came to.

    Attributes:
        loss: Mean over the global batch; the same bits on every rank.
        tally: The ranks' tallies added up; the same bits on every rank.
        seconds: Wall-clock of the step on this rank.
        compute_seconds: Spent in forward and backward passes (on a GPU: in launching them).
        bubble_seconds: Spent waiting for activations and gradients of neighbouring stages.
    """

    loss: float
    tally: tuple[float, ...]
    seconds: float
    compute_seconds: float
    bubble_seconds: float


@dataclass(slots=True)
class InFlight:
    """What the backward pass of one micro-batch on one stage needs.

    Attributes:
        leaves: Inputs whose gradient the stage before wants.
        outputs: What the next stage was told wants a gradient; on the last stage, the loss.
        cut: Where the graph ends before the input, if it was cut.
        division: Of the graph, for a split backward pass, if it is known already.
        exports: Where sequences are cut: tensors that later slices looked at, and the leaves with their gradients.
    """

    leaves: list[Tensor]
    outputs: list[Tensor]
    cut: Cut | None
    division: Division | None = None
    exports: Sequence[tuple[Tensor, Tensor]] = ()


@dataclass(slots=True)
class StepState:
    """The state of one pass through a program.

    Attributes:
        batches: This rank's micro-batches, or their slices.
        number: Optimizer step.
        backward: Whether gradients are wanted.
        targets_used: Whether the last stage computes a loss; otherwise its outputs are kept.
        loss_scale: What losses are multiplied by before their backward passes.
        slices: Into how many each micro-batch is cut.
        mailbox: Values that arrived, by direction, stage and micro-batch.
        outbox: Values to be sent, likewise, by the stage that sends.
        in_flight: By stage and micro-batch, from F to B or I.
        weight_work: By stage and micro-batch, from I to W.
        losses: Detached, of the micro-batches done so far.
        sequences: What earlier slices left for the later ones, by stage and micro-batch.
        outputs: Of the last stage, by micro-batch.
        action: Under way, for error messages.
    """

    batches: Sequence[MicroBatch]
    number: int
    backward: bool
    targets_used: bool
    loss_scale: float = 1.0
    slices: int = 1
    mailbox: dict[tuple[str, int, int], Received] = field(default_factory=dict)
    outbox: dict[tuple[str, int, int], Received] = field(default_factory=dict)
    in_flight: dict[tuple[int, int], InFlight] = field(default_factory=dict)
    weight_work: dict[tuple[int, int], WeightWork] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    sequences: dict[tuple[int, int], list[list[Tensor]]] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    action: Action | None = None

    def forget(self) -> None:
        """Begin anew: what was computed does not count."""
        self.mailbox.clear()
        self.outbox.clear()
        self.in_flight.clear()
        self.losses.clear()
        self.sequences.clear()
