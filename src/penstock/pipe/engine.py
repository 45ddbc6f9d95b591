"""Runs a schedule: the forward and backward passes of one optimizer step over the ranks of a pipeline.

A rank goes through its program, one action after the other::

    RECV_F  wait for the input of a stage           -> mailbox
    F       mailbox -> forward pass                 -> outbox, and kept in flight
    SEND_F  outbox -> the next stage, without waiting for it
    RECV_B  wait for the gradient of the output     -> mailbox
    B       mailbox, in flight -> backward pass     -> outbox
    SEND_B  outbox -> the stage before, without waiting for it

Where a schedule splits the backward pass, I and W stand for B: I makes the value for SEND_B, and leaves the work on the
weights for W::

    I       mailbox, in flight -> input gradients   -> outbox, weight work
    W       weight work -> weight gradients

Neighbouring stages on the same rank go from mailbox to mailbox. After the last action come the sum of tied gradients
and the exchange over replicas. The mean loss is on its way since the rank's last forward pass: a rank that is done
before others does not wait for them.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from penstock._core.batch_key import BatchKey
from penstock._core.meter import Meter
from penstock._core.protocols import GradientExchange
from penstock._core.sequence_slice import SequenceSlice
from penstock._core.waiting import Watcher
from penstock.pipe.agreement import agree
from penstock.pipe.broadcast import broadcast_value
from penstock.pipe.codec import Codec
from penstock.pipe.facts import check_fit, engine_facts
from penstock.pipe.frame import Address
from penstock.pipe.groups import PipeGroups
from penstock.pipe.loss import LossFn, loss_of, no_loss
from penstock.pipe.mean import PendingMean
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.program import Program, Steps
from penstock.pipe.receiver import Received
from penstock.pipe.schedule import Action, Channel, Schedule, get_schedule, head_start
from penstock.pipe.schedule.validate import validate
from penstock.pipe.slices import check_slices, cut_batches
from penstock.pipe.split_backward import SplitBackward
from penstock.pipe.stage import Cut, Stage
from penstock.pipe.step import InFlight, StepResult, StepState
from penstock.pipe.tied import TiedGradients
from penstock.pipe.transport import Transport
from penstock.pipe.value import flatten, to_device, unflatten
from penstock.pipe.weight_work import WeightWork, with_gradients


class PipelineEngine:
    """Computes losses and gradients of one rank's stages, together with the other ranks.

    It neither clears gradients nor steps an optimizer: clear ``.grad`` before :meth:`train_step`, step after it.
    Before the first step all ranks compare what they were given.

    Args:
        stages: This rank's stage, or stages in model order where the schedule places several on it.
        schedule: A name, or a schedule for this number of stages and micro-batches.
        micro_batches: Micro-batches per step and replica.
        groups: From the topology; collective.
        exchange: Communicates gradients over replicas, and scales them also where there is only one.
        loss_fn: ``loss_fn(output, targets)``, called on the last stage; None where the model returns its loss.
        watcher: Told of every wait, and of errors. None makes one that is not started.
        meter: None makes one.
        seed: The run's seed, for the layers that draw random numbers.
        device: Where batches are moved to.
        codecs: By direction (``"F"``, ``"B"``), what encodes values for other ranks; None sends them as they are.

    Attributes:
        recorded: A list to which start and end of every computed action are added, by ``time.perf_counter()``; None
            records nothing.

    Raises:
        ValueError: Stages, schedule and topology do not fit together, or the schedule cannot run.
    """

    def __init__(
        self,
        stages: Stage | Sequence[Stage],
        *,
        micro_batches: int,
        groups: PipeGroups,
        exchange: GradientExchange,
        schedule: str | Schedule = "1f1b",
        loss_fn: LossFn | None = None,
        watcher: Watcher | None = None,
        meter: Meter | None = None,
        seed: int = 1234,
        device: torch.device | str = "cpu",
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:
        local = [stages] if isinstance(stages, Stage) else list(stages)
        if not local:
            raise ValueError("an engine needs at least one stage")
        if isinstance(schedule, str):
            schedule = get_schedule(schedule, local[0].num_stages, micro_batches)
        check_fit(local, schedule, micro_batches, groups)
        if schedule.slices > 1:
            check_slices(local, schedule, loss_fn)
        # A stage runs at most this far ahead of its neighbour under 1F1B; with more room GPipe only fills memory.
        window = max(4, schedule.num_stages + 1)
        validate(schedule, capacity=window)
        self.stages = {stage.index: stage for stage in local}
        self.schedule = schedule
        self.micro_batches = micro_batches
        self.groups = groups
        self.exchange = exchange
        self.loss_fn = loss_fn
        self.watcher = watcher or Watcher(rank=groups.rank)
        self.meter = meter or Meter()
        self.seed = seed
        self.device = torch.device(device)
        self._program = Program.of(schedule, groups.pipe_rank)
        self._head, self._rest = self._program.divided(head_start(schedule))
        self._forward_programs: dict[int, Program] = {}
        self._codecs = dict(codecs or {})
        self._transport = Transport(
            groups.pipe_rank,
            groups.routes,
            watcher=self.watcher,
            meter=self.meter,
            window=window,
            codecs=self._codecs,
        )
        self._tied = TiedGradients(local, groups.tied, watcher=self.watcher, meter=self.meter)
        tied = self._tied.ids
        self._untied = {
            stage.index: [p for _, p in stage.canonical_parameters() if p.requires_grad and id(p) not in tied]
            for stage in local
        }
        self._splits = {stage.index: SplitBackward() for stage in local}
        self.recorded: list[tuple[float, float]] | None = None
        self._one: Tensor | None = None
        self._agreed = groups.store is None

    @property
    def whole_reasons(self) -> dict[int, tuple[str, ...]]:
        """For each local stage, why some of its weight gradients cannot wait, as far as split passes have shown."""
        return {index: tuple(split.reasons) for index, split in self._splits.items()}

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        *,
        step: int,
        tally: Sequence[float] = (),
        loss_scale: float = 1.0,
        validate: Callable[[], bool] | None = None,
    ) -> StepResult:
        """Forward and backward passes of one step; leaves the gradient of the global batch in ``.grad``.

        Args:
            batches: This replica's micro-batches, in order; ranks between the first and the last stage may leave
                inputs and targets None.
            step: Optimizer step, the same on every rank.
            tally: Numbers to add up over all ranks along with the losses, tokens read here for example; at most two,
                as many on every rank.
            loss_scale: What losses are multiplied by before the backward passes and gradients divided by before they
                are exchanged; the same on every rank. It keeps small float16 gradients from vanishing.
            validate: Called, on every rank or on none, after the forward passes of
                :func:`~penstock.pipe.schedule.head_start` and before any backward pass. It says whether the weights
                were right; where it has changed them, alike on all ranks, these passes are run again.

        Raises:
            ValueError: A wrong number of micro-batches, a loss that is no scalar, a stage output that cannot be sent,
                ranks with different settings.
            WaitError: A peer is gone or late.
        """
        start = time.perf_counter()
        before = dict(self.meter.seconds)
        state = StepState(batches, step, backward=True, targets_used=True, loss_scale=loss_scale)
        with self._failures_reported(state), self._random_state_kept():
            self._prepare(len(batches), self.micro_batches)
            slices = self.schedule.slices
            if slices > 1:
                state.batches, state.slices = cut_batches(batches, slices), slices
            program = self._program
            if validate is not None:
                self._run_head(state, validate)
                program = self._rest
            weight = 1.0 / (self.micro_batches * slices * self.groups.num_replicas * loss_scale)
            self.exchange.begin_step(lambda: weight)
            mean = self._run_with_mean(program, state, tally)
            self._tied.sum()
            self.exchange.ready(self._tied.parameters)
            # Before the exchange: it proves that all ranks train, which those that wait for gradients rely on. It
            # needs only what came before anyone's last backward pass.
            loss, tallied = mean.wait()
            # The exchange meters its own waits: only it knows what part of this is waiting.
            with self.watcher.waiting("exchange of gradients"):
                self.exchange.finish()
            self._transport.drain()
        spent = {name: seconds - before.get(name, 0.0) for name, seconds in self.meter.seconds.items()}
        return StepResult(
            loss=loss,
            tally=tallied,
            seconds=time.perf_counter() - start,
            compute_seconds=spent.get("compute", 0.0),
            bubble_seconds=spent.get("wait_forward", 0.0) + spent.get("wait_backward", 0.0),
        )

    def eval_step(self, batches: Sequence[MicroBatch], *, step: int = 0) -> float:
        """Mean loss over all replicas' micro-batches, in eval mode and without gradients; the same on every rank.

        Args:
            batches: As for :meth:`train_step`, but any number, the same along a pipeline.
            step: For the layers' keys.
        """
        state = StepState(batches, step, backward=False, targets_used=True)
        with self._failures_reported(state), self._evaluating():
            self._prepare(len(batches))
            mean = self._run_with_mean(self._forward_program(len(batches)), state)
            self._transport.drain()
            return mean.wait()[0]

    def predict_step(
        self, batches: Sequence[MicroBatch], *, step: int = 0, ranks: Collection[int] | None = ()
    ) -> list[Any] | None:
        """Outputs of the last stage for every micro-batch, in order, in eval mode and without gradients.

        Args:
            batches: As for :meth:`eval_step`; targets are not used.
            step: For the layers' keys.
            ranks: Pipeline ranks that are to have the outputs, beside the one with the last stage; None for all. It
                must be the same on all of them.

        Returns:
            The outputs of this replica's micro-batches; None on ranks that have neither the last stage nor asked.
        """
        known = self.schedule.num_ranks
        wrong = [rank for rank in ranks or () if not 0 <= rank < known]
        if wrong:
            raise ValueError(f"ranks={wrong} are no pipeline ranks: there are {known}, counted from 0")
        state = StepState(batches, step, backward=False, targets_used=False)
        with self._failures_reported(state), self._evaluating():
            self._prepare(len(batches))
            program = self._forward_program(len(batches))
            self._transport.begin(program.messages)
            self._run(program, program.steps, state)
            self._transport.drain()
            source = self.schedule.placement[-1]
            outputs = [state.outputs[i] for i in range(len(batches))] if source == self.groups.pipe_rank else None
            if self.groups.pipeline is not None and (ranks is None or set(ranks) - {source}):
                outputs = broadcast_value(
                    outputs,
                    source=source,
                    targets=ranks,
                    group=self.groups.pipeline,
                    device=self.device,
                    watcher=self.watcher,
                    meter=self.meter,
                )
            return outputs

    def _prepare(self, given: int, expected: int | None = None) -> None:
        if given == 0 or (expected is not None and given != expected):
            raise ValueError(
                f"got {given} micro-batches, but a step of this engine has {expected or 'at least 1'} per replica; "
                "split the batch accordingly, or make the engine with another number"
            )
        if not self._agreed:
            assert self.groups.store is not None
            facts = engine_facts(
                list(self.stages.values()), self.schedule, self.micro_batches, self.seed, codecs=self._codecs
            )
            agree(
                "the pipeline",
                facts,
                store=self.groups.store,
                rank=self.groups.rank,
                world_size=self.groups.topology.world_size(),
                watcher=self.watcher,
            )
            self._agreed = True

    def _forward_program(self, micro_batches: int) -> Program:
        program = self._forward_programs.get(micro_batches)
        if program is None:
            program = self._forward_programs[micro_batches] = self._program.forward_only(micro_batches)
        return program

    def _run_head(self, state: StepState, validate: Callable[[], bool]) -> None:
        """Forward passes on trust; run again where the weights turn out to have been wrong."""
        head = self._head
        buffers = [buffer for stage in self.stages.values() for buffer in stage.buffers()] if head.steps else []
        kept = [buffer.clone() for buffer in buffers]  # a forward pass may change them, as batch norms do
        self._transport.begin(head.messages)
        self._run(head, head.steps, state)
        if validate():
            return
        state.forget()
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)
        self._transport.begin(head.messages)
        self._run(head, head.steps, state)

    def _run_with_mean(self, program: Program, state: StepState, tally: Sequence[float] = ()) -> PendingMean:
        self._transport.begin(program.messages)
        self._run(program, program.steps[: program.forwards_end], state)
        mean = self._mean_of(state, tally)
        self._run(program, program.steps[program.forwards_end :], state)
        return mean

    def _run(self, program: Program, steps: Steps, state: StepState) -> None:
        compute_seconds = 0.0
        for action, channel in steps:
            state.action = action
            stage, op, micro_batch = action
            if channel is not None:
                self._communicate(action, channel, state)
                if op == "SEND_F" and (stage, micro_batch) in program.split:
                    # Here the next stage has what it waits for, and this rank often has to wait itself.
                    passed = state.in_flight[stage, micro_batch]
                    passed.division = self._splits[stage].divide(passed.outputs, passed.leaves, passed.cut)
                continue
            start = time.perf_counter()
            last = action == program.last_backward.get(stage)
            if op == "F":
                self._forward(self.stages[stage], micro_batch, state, split=(stage, micro_batch) in program.split)
            elif op == "B":
                if last:
                    self.exchange.arm(self._untied[stage])
                self._backward(self.stages[stage], micro_batch, state)
            elif op == "I":
                self._backward_inputs(self.stages[stage], micro_batch, state)
            elif last:
                self._finish_weights(self._untied[stage], state.weight_work.pop((stage, micro_batch)))
            else:
                state.weight_work.pop((stage, micro_batch)).run()
            end = time.perf_counter()
            compute_seconds += end - start
            if self.recorded is not None:
                self.recorded.append((start, end))
        self.meter.add_seconds("compute", compute_seconds)
        state.action = None

    def _communicate(self, action: Action, channel: Channel, state: StepState) -> None:
        stage, op, micro_batch = action
        direction = op[-1]
        index = state.batches[micro_batch].index
        if op.startswith("RECV"):
            address = Address(direction, stage, state.number, index)
            state.mailbox[direction, stage, micro_batch] = self._transport.receive(channel, address)
            return
        value = state.outbox.pop((direction, stage, micro_batch))
        address = Address(direction, stage + 1 if direction == "F" else stage - 1, state.number, index)
        self._transport.send(channel, address, value.structure, value.tensors, value.positions)

    def _forward(self, stage: Stage, micro_batch: int, state: StepState, *, split: bool) -> None:
        batch = state.batches[micro_batch]
        leaves: list[Tensor] = []
        positions = batch.positions
        if stage.is_first:
            value = batch.inputs if self.device.type == "cpu" else to_device(batch.inputs, self.device)
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
        targets = batch.targets if self.device.type == "cpu" else to_device(batch.targets, self.device)
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

    def _backward(self, stage: Stage, micro_batch: int, state: StepState) -> None:
        passed = state.in_flight.pop((stage.index, micro_batch))
        outputs, gradients = self._gradients(stage, micro_batch, passed, state)
        if outputs:
            torch.autograd.backward(outputs, gradients)
        self._pass_back(stage, micro_batch, [leaf.grad for leaf in passed.leaves], state)

    def _backward_inputs(self, stage: Stage, micro_batch: int, state: StepState) -> None:
        passed = state.in_flight.pop((stage.index, micro_batch))
        outputs, gradients = self._gradients(stage, micro_batch, passed, state)
        found, work = self._splits[stage.index].input_half(
            outputs, gradients, passed.leaves, passed.cut, passed.division
        )
        state.weight_work[stage.index, micro_batch] = work
        self._pass_back(stage, micro_batch, found, state)

    def _finish_weights(self, parameters: list[nn.Parameter], work: WeightWork) -> None:
        """Run the last weight work of a stage, telling the exchange which gradients it makes final as it goes."""
        left = {id(parameter): parameter for parameter in parameters}

        def arm(finished: list[Tensor]) -> None:
            self.exchange.arm([left.pop(id(parameter)) for parameter in finished if id(parameter) in left])

        work.run(arm)
        self.exchange.ready(left.values())

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

    def _mean_of(self, state: StepState, tally: Sequence[float] = ()) -> PendingMean:
        return PendingMean(
            state.losses,
            tally,
            step=state.number,
            training=state.backward,
            group=self.groups.control,
            watcher=self.watcher,
            meter=self.meter,
        )

    @contextmanager
    def _failures_reported(self, state: StepState) -> Iterator[None]:
        """Say where an error happened, and tell the other ranks."""
        try:
            yield
        except BaseException as error:
            where = f"rank {self.groups.rank}, step {state.number}"
            if state.action is not None:
                stage, op, micro_batch = state.action
                where += f", stage {stage}, {op}, micro-batch {state.batches[micro_batch].index}"
            error.add_note(f"(penstock: {where})")
            self.watcher.report(error)
            raise

    @contextmanager
    def _random_state_kept(self) -> Iterator[None]:
        """Give back torch's random states: layers are seeded, and each rank has other layers.

        A user's shuffling draws from the same generators; it has to go on alike where the inputs and where the targets
        of a batch are read.
        """
        on_gpu = self.device.type == "cuda"
        state = torch.get_rng_state()
        gpu_state = torch.cuda.get_rng_state(self.device) if on_gpu else None
        try:
            yield
        finally:
            torch.set_rng_state(state)
            if gpu_state is not None:
                torch.cuda.set_rng_state(gpu_state, self.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode without gradients; each module gets back the mode that it had."""
        modes = [(module, module.training) for stage in self.stages.values() for module in stage.modules()]
        for stage in self.stages.values():
            stage.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
