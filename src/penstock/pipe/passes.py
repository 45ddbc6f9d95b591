"""The forward and backward passes of a rank's stages, each of one micro-batch, from mailbox to mailbox or outbox."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from penstock._core.batch_key import BatchKey
from penstock._core.sequence_slice import SequenceSlice
from penstock.pipe.loss import LossFn, loss_of, no_loss
from penstock.pipe.receiver import Received
from penstock.pipe.split_backward import SplitBackward
from penstock.pipe.stage import Cut, Stage
from penstock.pipe.step import InFlight, StepState
from penstock.pipe.value import flatten, to_device, unflatten
from penstock.pipe.weight_work import with_gradients


class Passes:
    """Computes on stages what an engine asks for; whatever is between two passes lies in the step's state.

    Args:
        stages: This rank's.
        loss_fn: ``loss_fn(output, targets)``; None where the model returns its loss.
        seed: The run's, for the layers that draw random numbers.
        device: Where batches are moved to.

    Attributes:
        stages: By number.
        splits: How each stage's backward passes are split.
        loss_fn: As given, and so is the seed.
    """

    def __init__(self, stages: Sequence[Stage], *, loss_fn: LossFn | None, seed: int, device: torch.device) -> None:
        self.stages = {stage.index: stage for stage in stages}
        self.splits = {stage.index: SplitBackward() for stage in stages}
        self.loss_fn = loss_fn
        self.seed = seed
        self._device = device
        self._one: Tensor | None = None

    def forward(self, index: int, micro_batch: int, state: StepState, *, split: bool) -> None:
        """Run a stage; its output, or the loss, is kept where it is looked for.

        Args:
            index: The stage.
            micro_batch: Which of the state's.
            state: Of the step.
            split: Whether the backward pass will come in two halves.
        """
        stage = self.stages[index]
        batch = state.batches[micro_batch]
        leaves: list[Tensor] = []
        positions = batch.positions
        if stage.is_first:
            value = batch.inputs if self._device.type == "cpu" else to_device(batch.inputs, self._device)
        else:
            arrived = state.mailbox.pop(("F", stage.index, micro_batch))
            positions = arrived.positions or positions
            if state.backward:
                wanted = zip(arrived.tensors, arrived.requires_grad, strict=True)
                leaves = [tensor.requires_grad_() for tensor, wants in wanted if wants]
            value = unflatten(arrived.structure, arrived.tensors)
            del arrived
        cuts: list[Cut] | None = [] if split and not leaves and state.backward else None
        piece = None if state.slices == 1 else self._slice(stage.index, micro_batch, state)
        output = stage(value, BatchKey(self.seed, state.number, batch.index, positions, piece), cuts)
        if stage.is_last:
            outputs = self._finish_forward(stage, micro_batch, output, state)
        else:
            structure, tensors = flatten(output, what=f"the output of stage {stage.index}")
            self._pass_on("F", stage.index, micro_batch, Received(structure, tensors, (), positions), state)
            outputs = [tensor for tensor in tensors if tensor.requires_grad]
        if state.backward:
            state.in_flight[stage.index, micro_batch] = InFlight(
                leaves, outputs, cuts[0] if cuts else None, exports=() if piece is None else piece.exports
            )

    def _slice(self, stage: int, unit: int, state: StepState) -> SequenceSlice:
        micro_batch, number = divmod(unit, state.slices)
        kept = state.sequences.setdefault((stage, micro_batch), [])
        if number == state.slices - 1:
            del state.sequences[stage, micro_batch]  # nobody comes after it
        return SequenceSlice(number, kept)

    def _finish_forward(self, stage: Stage, micro_batch: int, output: Any, state: StepState) -> list[Tensor]:
        """The end of the model: the loss, or the output kept for a prediction."""
        if not state.targets_used:
            state.outputs[micro_batch] = output
            return []
        batch = state.batches[micro_batch]
        targets = batch.targets if self._device.type == "cpu" else to_device(batch.targets, self._device)
        if batch.weight == 0.0:
            loss = no_loss(output, stage=stage.index)
        else:
            with stage.autocast():
                loss = loss_of(output, targets, self.loss_fn, stage=stage.index)
            if batch.weight != 1.0:
                loss = loss * batch.weight
        if state.backward and not loss.requires_grad:
            raise ValueError(
                f"stage {stage.index}: the loss depends on no parameter that requires a gradient; "
                "was it detached, or is every parameter frozen?"
            )
        state.losses.append(loss.detach())
        return [loss * state.loss_scale if state.backward and state.loss_scale != 1.0 else loss]

    def backward(self, index: int, micro_batch: int, state: StepState) -> None:
        """Run the whole backward pass of a micro-batch on a stage."""
        stage = self.stages[index]
        passed = state.in_flight.pop((stage.index, micro_batch))
        outputs, gradients = self._gradients(stage, micro_batch, passed, state)
        if outputs:
            torch.autograd.backward(outputs, gradients)
        self._pass_back(stage, micro_batch, [leaf.grad for leaf in passed.leaves], state)

    def divide(self, index: int, micro_batch: int, state: StepState) -> None:
        """Find out how the backward pass will be split, for which :meth:`backward_inputs` then need not stop."""
        passed = state.in_flight[index, micro_batch]
        passed.division = self.splits[index].divide(passed.outputs, passed.leaves, passed.cut)

    def backward_inputs(self, index: int, micro_batch: int, state: StepState) -> None:
        """Run the first half of a backward pass, and leave the work on the weights in the state."""
        stage = self.stages[index]
        passed = state.in_flight.pop((stage.index, micro_batch))
        outputs, gradients = self._gradients(stage, micro_batch, passed, state)
        found, work = self.splits[stage.index].input_half(
            outputs, gradients, passed.leaves, passed.cut, passed.division
        )
        state.weight_work[stage.index, micro_batch] = work
        self._pass_back(stage, micro_batch, found, state)

    def _gradients(
        self, stage: Stage, micro_batch: int, passed: InFlight, state: StepState
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What a backward pass starts from: outputs and their gradients."""
        outputs, gradients = passed.outputs, self._arrived(stage, micro_batch, passed, state)
        if passed.exports:  # later slices have run backward: what they ask of this one is there
            outputs = [*outputs, *(tensor for tensor, _ in passed.exports)]
            gradients = [*gradients, *(leaf.grad for _, leaf in passed.exports)]
        return with_gradients(outputs, gradients)

    def _arrived(self, stage: Stage, micro_batch: int, passed: InFlight, state: StepState) -> Sequence[Tensor | None]:
        """The gradients of a stage's outputs."""
        if not stage.is_last:
            arrived = state.mailbox.pop(("B", stage.index, micro_batch))
            gradients: list[Tensor | None] = unflatten(arrived.structure, arrived.tensors)
            return gradients
        loss = passed.outputs[0]
        if self._one is None or self._one.dtype != loss.dtype or self._one.device != loss.device:
            self._one = torch.ones_like(loss)
        return [self._one]

    def _pass_back(self, stage: Stage, micro_batch: int, gradients: Sequence[Tensor | None], state: StepState) -> None:
        if not stage.is_first:
            structure, tensors = flatten(list(gradients))
            self._pass_on("B", stage.index, micro_batch, Received(structure, tensors, (), ()), state)

    def _pass_on(self, direction: str, stage: int, micro_batch: int, value: Received, state: StepState) -> None:
        """Put a value where the neighbouring stage, here or on another rank, will take it from."""
        to = stage + 1 if direction == "F" else stage - 1
        if to not in self.stages:
            state.outbox[direction, stage, micro_batch] = value
            return
        wants = tuple(tensor.requires_grad for tensor in value.tensors)
        tensors = [tensor.detach() for tensor in value.tensors]
        state.mailbox[direction, to, micro_batch] = Received(value.structure, tensors, wants, value.positions)
