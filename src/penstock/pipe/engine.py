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

from penstock._core.meter import Meter
from penstock._core.protocols import GradientExchange
from penstock._core.waiting import Watcher
from penstock.pipe.agreement import agree
from penstock.pipe.broadcast import broadcast_value
from penstock.pipe.codec import Codec
from penstock.pipe.common_sum import CommonSum, CommonSums
from penstock.pipe.facts import check_fit, engine_facts
from penstock.pipe.frame import Address
from penstock.pipe.groups import PipeGroups
from penstock.pipe.loss import LossFn
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.modes import evaluating, random_state_kept
from penstock.pipe.passes import Passes
from penstock.pipe.program import Program, Steps
from penstock.pipe.schedule import Action, Channel, Schedule, get_schedule, head_start
from penstock.pipe.schedule.validate import validate
from penstock.pipe.slices import check_slices, cut_batches
from penstock.pipe.stage import Stage
from penstock.pipe.step import StepResult, StepState
from penstock.pipe.tied import TiedGradients
from penstock.pipe.transport import Transport
from penstock.pipe.weight_work import WeightWork


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
        passes: Computes on the stages.
        sums: Adds up numbers over all ranks.
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
        self.device = torch.device(device)
        self.passes = Passes(local, loss_fn=loss_fn, seed=seed, device=self.device)
        self.stages = self.passes.stages
        self.schedule = schedule
        self.micro_batches = micro_batches
        self.groups = groups
        self.exchange = exchange
        self.watcher = watcher or Watcher(rank=groups.rank)
        self.meter = meter or Meter()
        self._program = Program.of(schedule, groups.pipe_rank)
        self._head, self._rest = self._program.divided(head_start(schedule))
        self._forward_programs: dict[int, Program] = {}
        self._codecs = dict(codecs or {})
        self.sums = CommonSums(groups, schedule.placement[-1], watcher=self.watcher, meter=self.meter)
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
        self.recorded: list[tuple[float, float]] | None = None
        self._agreed = groups.store is None

    @property
    def loss_fn(self) -> LossFn | None:
        """What computes the loss from output and targets; None where the model does."""
        return self.passes.loss_fn

    @property
    def whole_reasons(self) -> dict[int, tuple[str, ...]]:
        """For each local stage, why some of its weight gradients cannot wait, as far as split passes have shown."""
        return {index: tuple(split.reasons) for index, split in self.passes.splits.items()}

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
            tally: Numbers to add up over all ranks along with the losses, tokens read here for example; as many on
                every rank.
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
        with self._failures_reported(state), random_state_kept(self.device):
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
            loss, tallied = _mean(mean)
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
        with self._failures_reported(state), evaluating(self.stages.values()):
            self._prepare(len(batches))
            mean = self._run_with_mean(self._forward_program(len(batches)), state)
            self._transport.drain()
            return _mean(mean)[0]

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
        with self._failures_reported(state), evaluating(self.stages.values()):
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
                list(self.stages.values()), self.schedule, self.micro_batches, self.passes.seed, codecs=self._codecs
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

    def _run_with_mean(self, program: Program, state: StepState, tally: Sequence[float] = ()) -> CommonSum:
        self._transport.begin(program.messages)
        self._run(program, program.steps[: program.forwards_end], state)
        total = torch.stack(state.losses).double().sum().item() if state.losses else 0.0
        numbers = [total, len(state.losses), *tally]
        mean = self.sums.start(numbers, "mean loss", step=state.number, training=state.backward)
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
                    self.passes.divide(stage, micro_batch, state)
                continue
            start = time.perf_counter()
            last = action == program.last_backward.get(stage)
            if op == "F":
                self.passes.forward(stage, micro_batch, state, split=(stage, micro_batch) in program.split)
            elif op == "B":
                if last:
                    self.exchange.arm(self._untied[stage])
                self.passes.backward(stage, micro_batch, state)
            elif op == "I":
                self.passes.backward_inputs(stage, micro_batch, state)
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

    def _finish_weights(self, parameters: list[nn.Parameter], work: WeightWork) -> None:
        """Run the last weight work of a stage, telling the exchange which gradients it makes final as it goes."""
        left = {id(parameter): parameter for parameter in parameters}

        def arm(finished: list[Tensor]) -> None:
            self.exchange.arm([left.pop(id(parameter)) for parameter in finished if id(parameter) in left])

        work.run(arm)
        self.exchange.ready(left.values())

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


def _mean(total: CommonSum) -> tuple[float, tuple[float, ...]]:
    """The mean loss and the tallies, once every rank has been heard."""
    losses, count, *tally = total.wait()
    return losses / count, tuple(tally)
