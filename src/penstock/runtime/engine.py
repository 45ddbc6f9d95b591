"""The run that composes the four parts: batches in order, stages, exchange, optimizer, ledger."""

import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from penstock._core.protocols import Synchronizes, Undoable
from penstock.compression import Reducer
from penstock.data_pipeline.data_sampling import Consumed
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.step import StepResult
from penstock.runtime import batches
from penstock.runtime.clipping import clip_, global_norm, largest
from penstock.runtime.engine_state import load, save
from penstock.runtime.feed import Shape, Step
from penstock.runtime.gather import any_rank, gather_json
from penstock.runtime.ledger import chain, merge
from penstock.runtime.local_replicas import common_weights
from penstock.runtime.loss_weighting import weigh_by_tokens
from penstock.runtime.parts import Parts, Progress
from penstock.runtime.recording import TimelineRecorder
from penstock.runtime.stopping import StopRequest
from penstock.runtime.summary import summarize

_TAKEN_BACK: Final = ("step", "samples", "tokens", "layer_tokens")
"""What of the progress a step moves."""


class NotFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite; training on would only spread it."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one training step did.

    Attributes:
        step: The step, from 0.
        loss: Mean loss of the global batch.
        lr: Learning rate of the first parameter group.
        tokens: Tokens consumed after the step.
        samples: Samples consumed after the step.
        kept_tokens: Tokens that dropping layers kept per sequence; None without dropping.
        difficulty: Curriculum difficulty by metric at the step's first sample.
        gradient_norm: Global norm before clipping; None without clipping. With ``optimizer.post_validation`` it comes
            when the step is validated: ``engine.last`` lacks it until then.
        seconds: Wall-clock of the step on this rank.
        bubble_seconds: Of these, waiting for neighbours in the pipeline.
        loss_scale: What the next step's loss is scaled by; None but in float16.
        skipped: Whether gradients overflowed in float16, so that the weights stayed as they were. The batch counts as
            consumed all the same.
    """

    step: int
    loss: float
    lr: float
    tokens: int
    samples: int
    kept_tokens: int | None
    difficulty: dict[str, float]
    gradient_norm: float | None
    seconds: float
    bubble_seconds: float
    loss_scale: float | None = None
    skipped: bool = False


class Engine:
    """Trains one model over the processes of a run; made by :func:`penstock.initialize`.

    Every rank makes the same calls in the same order. An exception on one rank ends the others within seconds, with its
    message.

    Attributes:
        config: The run's configuration.
        stage: The layers on this rank, an ``nn.Module``.
        optimizer: The optimizer of these layers.
        progress: Steps, samples and tokens so far.
        ledger: What was spent.
        last: Report of the last training step, or None.
        stop_request: Whether this process was asked to stop; ``with engine.stop_request.listening():`` listens for
            SIGTERM.
        stopping: Whether any process had been asked to stop when the last step ended; the same on every rank.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config = parts.config
        self.stage = parts.stage
        self.optimizer = parts.optimizer
        self.progress = Progress()
        self.ledger = parts.rates.ledger
        self.last: StepReport | None = None
        self._recorder = TimelineRecorder(parts)
        self.stop_request = StopRequest()
        self.stopping = False
        self._trusted = parts.post_validation
        self._before: tuple[dict[str, int], StepReport | None] = ({}, None)
        self._consumed = Consumed()

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.parts.process.rank

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.parts.process.world_size

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.parts.process.device

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> float:
        """One optimizer step on one global batch.

        Args:
            data_iter: Yields this replica's micro-batches as pairs ``(inputs, targets)``; where the model returns its
                loss, what is no pair is inputs alone. Ranks that hold neither the first nor the last stage do not
                touch it. None reads ``training_data`` in the sampler's order.

        Returns:
            The mean loss over the global batch, the same on every rank.

        Raises:
            ValueError: There is no data, or it does not fit.
            NotFiniteError: The loss or a gradient is not finite; the weights are those before the step. (An optimizer
                that exchanges gradients itself raises FloatingPointError for these.) With
                ``optimizer.post_validation`` a gradient's is raised by the next call, for the step before.
        """
        parts, progress = self.parts, self.progress
        with self._told("train_batch"):
            started = time.perf_counter()
            trusted = self._trusted if self._trusted is not None and self._trusted.pending else None
            if trusted is None:
                self.optimizer.zero_grad()  # a step that ended in an error leaves gradients behind
            kept = None if parts.dropping is None else parts.dropping.update(progress.step, progress.tokens)
            step = parts.feed.step(progress.step, samples=progress.samples, tokens=progress.tokens)
            micro_batches, consumed = self._training_batches(data_iter, step)
            if step.tokens is None:  # otherwise the step's plan has weighed them
                micro_batches = self._weighted(micro_batches, training=True)
            read = sum(batches.tokens_in(batch.inputs) for batch in micro_batches) if parts.cut.enters else 0
            self._recorder.begin()
            result = parts.pipeline.train_step(
                micro_batches,
                step=progress.step,
                tally=(read, self.stop_request.heard),
                loss_scale=1.0 if parts.scaler is None else parts.scaler.scale,
                validate=None if trusted is None else self._validated,
            )
            tokens = round(result.tally[0]) if step.tokens is None else step.tokens
            self.stopping = result.tally[1] > 0
            skipped = self._overflowed(result.loss)
            if not skipped:
                self._check_finite("loss", result.loss)
            norm = None if skipped or self._trusted is not None else self._clip()
            shapes = parts.feed.shapes(step, tokens)
            layer_tokens = 0
            if parts.dropping is not None and kept is not None:
                layer_tokens = parts.dropping.layer_tokens(tokens, kept, rows=sum(shape.rows for shape in shapes))
            lr = self._set_lr(tokens, layer_tokens, step.lr_factor)
            if self._trusted is not None:
                self._before = ({name: getattr(progress, name) for name in _TAKEN_BACK}, self.last)
                self._consumed = consumed
                self._trusted.step()
            else:
                if not skipped:
                    self.optimizer.step()
                self.optimizer.zero_grad()
                progress.read.add(consumed)
            self._advance(started, kept, lr, norm, tokens, result, step, shapes, skipped=skipped)
            progress.layer_tokens += layer_tokens
            assert self.last is not None
            self._recorder.end(self.last.step, self.last.seconds)
        return result.loss

    def validate(self) -> None:
        """With ``optimizer.post_validation``: wait until the last step is what it is to be; every rank calls it.

        Until then the weights of this rank are provisional. The engine's own methods validate first; call it before
        reading ``stage`` or ``optimizer`` directly. Otherwise it does nothing.

        Raises:
            NotFiniteError: The last step's gradient was not finite; everything is as it was before that step.
        """
        if self._trusted is not None and self._trusted.pending:
            with self._told("validate"):
                self._validated()

    def eval_batch(self, data_iter: Iterator[Any]) -> float:
        """Mean loss of one global batch in eval mode, without gradients, the same on every rank.

        Where replicas train apart, it is that of the weights on which all agree: those of their last exchange.

        Args:
            data_iter: As for :meth:`train_batch`.
        """
        parts = self.parts
        self.validate()
        with self._told("eval_batch"):
            micro_batches = self._weighted(self._given_batches(data_iter), training=False)
            with common_weights(parts):
                loss = parts.pipeline.eval_step(micro_batches, step=self.progress.step)
            self._reshard()
            return loss

    def synchronize(self) -> None:
        """Where replicas train apart, exchange what they have learnt since they last did; every rank calls it.

        For the end of training, so that the weights on which all agree hold the last steps, too. Otherwise it does
        nothing.
        """
        with self._told("synchronize"):
            for owner in (self.parts.local_updates, self.parts.optimizer):
                if isinstance(owner, Synchronizes):
                    owner.synchronize()

    def predict_batch(self, data_iter: Iterator[Any], *, pipe_ranks: Collection[int] | None = None) -> list[Any]:
        """Outputs of the last layer for one global batch in eval mode: this replica's micro-batches in order.

        Args:
            data_iter: Yields inputs, or pairs of which the second is ignored.
            pipe_ranks: Ranks along the pipeline that are to have the outputs, the same on every rank; None for all.
                Outputs of a language model are large: where only some ranks use them, say so.

        Returns:
            A list with one output per micro-batch; an empty one on ranks that did not ask.

        Raises:
            ValueError: There is no such pipeline rank.
        """
        parts = self.parts
        self.validate()
        with self._told("predict_batch"):
            cut = replace(parts.cut, labels_enter=False)  # with them a model may give losses
            micro_batches = batches.from_iterator(data_iter, cut, self.progress.samples, targets_needed=False)
            with common_weights(parts):
                outputs = parts.pipeline.predict_step(micro_batches, ranks=pipe_ranks)
            self._reshard()
            asked = pipe_ranks is None or parts.groups.pipe_rank in pipe_ranks
            return (outputs or []) if asked else []

    def report_validation(self, loss: float) -> bool:
        """Tell a curriculum that is paced by it the validation loss; every rank calls it with the same value.

        Returns:
            Whether more samples will enter the pool; always False without such a curriculum.
        """
        order = self.parts.order
        if order is None or not order.paced:
            return False
        return order.report_validation(loss, step=self.progress.step)

    def save_checkpoint(self, directory: str | Path, *, keep: int | None = None) -> Path:
        """Write a checkpoint ``directory/step_NNNNNNNN``, complete once this returns; every rank calls it.

        Args:
            directory: The same on every rank, on storage that all of them see.
            keep: How many complete checkpoints to keep; None keeps all.

        Returns:
            The checkpoint's own directory.
        """
        self.validate()
        with self._told("save_checkpoint"):
            return save(self.parts, self.progress, Path(directory), keep=keep)

    def load_checkpoint(self, directory: str | Path) -> Path:
        """Load a checkpoint, or the newest complete one in a directory of several; every rank calls it.

        The layout may differ from the one it was written on: layers are found by their canonical names. On the same
        layout training goes on bit for bit; on another one, what belongs to a rank alone (error memories) starts
        at zero; but where only the number of replicas differs, optimizers that compress take over what was owed.

        Returns:
            The checkpoint that was loaded.
        """
        with self._told("load_checkpoint"):
            if self._trusted is not None and self._trusted.pending:
                self._trusted.validate()  # whatever it says, the checkpoint replaces it
                self.optimizer.zero_grad()
            return load(self.parts, self.progress, Path(directory))

    def summary(self) -> dict[str, Any]:
        """What all ranks have spent so far, beside what the plain run would have; every rank calls it.

        Returns:
            The same JSON value on every rank; see :func:`penstock.runtime.summary.summarize`, whose neighbour
            ``render`` makes a table of it.
        """
        parts = self.parts
        with self._told("summary"), parts.watcher.waiting("gathering the ledgers"):
            states = gather_json(parts.rates.ledger.state_dict(), group=parts.groups.control, meter=parts.meter)
        spent, earlier = merge(states), self.progress.earlier
        return summarize(spent if earlier is None else chain(earlier, spent))

    def close(self) -> None:
        """End the watcher, this engine's process groups and, if :func:`penstock.initialize` made it, the default one.

        Every rank calls it. The model and the optimizer stay as they are.
        """
        try:
            self.validate()
        finally:
            self._end()

    def _end(self) -> None:
        parts = self.parts
        parts.watcher.stop()
        if isinstance(parts.exchange, Reducer):
            parts.exchange.close()
        if parts.local_updates is not None:
            parts.local_updates.detach()
        parts.groups.close()
        parts.process.leave()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self.world_size > 1:
            self.parts.watcher.report(error)
            return  # work may be in flight: the process is about to end, and must not wait for it
        if error is not None:
            self._end()
        else:
            self.close()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Tell the other ranks when this one fails."""
        try:
            yield
        except BaseException as error:
            if not getattr(error, "__notes__", ()):  # the pipeline's own says more
                error.add_note(f"rank {self.rank}, {what}, step {self.progress.step}")
            self.parts.watcher.report(error)
            raise

    def _validated(self) -> bool:
        """Settle the step that was made on trust; says whether its weights stand as the forward passes met them."""
        assert self._trusted is not None
        norm, stands = self._trusted.validate()
        self.optimizer.zero_grad()
        if not math.isfinite(norm):
            before, self.last = self._before
            for name, value in before.items():
                setattr(self.progress, name, value)
            self._check_finite("gradient norm", norm)
        self.progress.read.add(self._consumed)
        if self.last is not None and self.config.optimizer.gradient_clipping is not None:
            self.last = replace(self.last, gradient_norm=norm)
        return stands

    def _training_batches(self, data_iter: Iterator[Any] | None, step: Step) -> tuple[list[MicroBatch], Consumed]:
        parts = self.parts
        if data_iter is not None:
            if parts.feed.varies:
                raise ValueError(
                    "the batching section decides what a step reads of the training data, but train_batch was given a "
                    "data_iter; remove one of them"
                )
            return self._given_batches(data_iter), Consumed()  # which samples these are is not known here
        if parts.training_data is None or parts.order is None:
            raise ValueError(
                "there is nothing to train on: give train_batch a data_iter, initialize a training_data, "
                "or the configuration a data.train"
            )
        collate = parts.feed.collate(parts.collate, step)
        return batches.from_order(parts.training_data, parts.order, collate, parts.cut, step)

    def _given_batches(self, data_iter: Iterator[Any]) -> list[MicroBatch]:
        parts = self.parts
        # Where the model returns its loss, the labels are among its inputs.
        targets_needed = parts.pipeline.loss_fn is not None
        return batches.from_iterator(data_iter, parts.cut, self.progress.samples, targets_needed=targets_needed)

    def _reshard(self) -> None:
        """Free what forward passes gathered and no backward pass will free."""
        if self.config.data_parallel.sharded:
            self.parts.exchange.reshard()  # type: ignore[attr-defined]

    def _weighted(self, micro_batches: list[MicroBatch], *, training: bool) -> list[MicroBatch]:
        """Micro-batches that count by their labels, unless they count alike."""
        parts = self.parts
        if self.config.train.loss_weighting == "micro_batches" or parts.pipeline.loss_fn is None:
            return micro_batches
        return weigh_by_tokens(
            micro_batches,
            is_last=parts.cut.is_last,
            counts=parts.cut.counts,
            total_micro_batches=parts.cut.micro_batches * parts.cut.replicas,
            step=self.progress.step,
            training=training,
            sums=parts.pipeline.sums,
        )

    def _overflowed(self, loss: float) -> bool:
        """With float16: whether a gradient anywhere is not finite, so that the step must be skipped."""
        parts = self.parts
        if parts.scaler is None:
            return False
        here = not (math.isfinite(loss) and math.isfinite(largest(self.stage.parameters())))
        overflowed = any_rank(
            here, what="overflow of gradients", group=parts.groups.control, watcher=parts.watcher, meter=parts.meter
        )
        if overflowed and isinstance(parts.exchange, Undoable):
            parts.exchange.undo()  # other buckets may have been exchanged in full: what they sent is thrown away, too
        parts.scaler.update(overflowed=overflowed)
        return overflowed

    def _check_finite(self, what: str, value: float) -> None:
        if value - value != 0.0:  # NaN and both infinities
            raise NotFiniteError(
                f"step {self.progress.step}: the {what} is {value}; lower the learning rate, look at the samples at "
                f"positions {self.progress.samples} and on (penstock order prints them), "
                "or go back to an earlier checkpoint"
            )

    def _clip(self) -> float | None:
        limit = self.config.optimizer.gradient_clipping
        parts = self.parts
        if limit is None:
            if parts.exchange.averages_gradients or parts.local_updates is not None:
                # otherwise the optimizer looks at what it averages
                self._check_finite("largest gradient", largest(self.stage.parameters()))
            return None
        with parts.watcher.waiting("gradient norm", stage=self.stage.index):
            groups = parts.groups
            divided = self.config.data_parallel.sharded or groups.model is not None
            norm = global_norm(
                parts.shared.counted_here,
                group=groups.control if divided else groups.pipeline,
                axes={"data": groups.num_replicas, "model": groups.num_model_ranks} if divided else None,
                meter=parts.meter,
            )
        self._check_finite("gradient norm", norm)
        clip_(self.stage.parameters(), norm=norm, max_norm=limit)
        return norm

    def _set_lr(self, step_tokens: int, step_layer_tokens: int, step_factor: float) -> float:
        schedule, clock, step = self.parts.schedule, self.progress.tokens, step_tokens
        if schedule is not None and schedule.by == "layer_tokens":
            clock, step = self.progress.layer_tokens, step_layer_tokens
        for group in self.optimizer.param_groups:
            if schedule is not None:
                factor = schedule.lr_for_step(clock, step) / schedule.peak
                group["lr"] = group["initial_lr"] * factor * step_factor
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer.param_groups else 0.0

    def _advance(
        self,
        started: float,
        kept: int | None,
        lr: float,
        norm: float | None,
        tokens: int,
        result: StepResult,
        step: Step,
        shapes: tuple[Shape, ...],
        *,
        skipped: bool,
    ) -> None:
        parts, progress = self.parts, self.progress
        difficulty = {} if parts.order is None else dict(parts.order.difficulty_at(progress.samples))
        progress.step += 1
        progress.samples += step.samples
        progress.tokens += tokens
        seconds = time.perf_counter() - started
        parts.rates.enter(shapes, tokens=tokens, kept=kept, seconds=seconds, bubble_seconds=result.bubble_seconds)
        self.last = StepReport(
            step=progress.step - 1,
            loss=result.loss,
            lr=lr,
            tokens=progress.tokens,
            samples=progress.samples,
            kept_tokens=kept,
            difficulty=difficulty,
            gradient_norm=norm,
            seconds=seconds,
            bubble_seconds=result.bubble_seconds,
            loss_scale=None if parts.scaler is None else parts.scaler.scale,
            skipped=skipped,
        )
