"""0/1 Adam: compressed from early on, and after a while not even that at every step.

Lu, Li, Zhang, De Sa, He, "Maximizing communication efficiency for large-scale training via 0/1 Adam", ICLR 2023
(arXiv:2202.06009), Algorithm 1. Two things differ from 1-bit Adam. The variance is updated at fewer and fewer steps
(with the averaged gradient) instead of at every step of a long warm-up, and the momentum is compressed at all others.
And once the variance is frozen, replicas step by themselves for a few steps: with ``v`` frozen, where a replica goes in
a round is ``-u_i / sqrt(v)``, ``u_i`` being the sum of ``lr_t m_t``. At the end of the round the ``u_i`` are averaged,
compressed with error feedback; the common parameters go along the average, and the common momentum is that average
over the sum of the ``lr_t``.

Three things go beyond the paper. Bias corrections enter as factors of the rates. Decoupled weight decay shrinks the
common parameters, ``u_i`` and the sum of the rates alike at every step, which makes the end of a round exactly the mean
of the replicas' own AdamW steps. And at a step that updates the variance the momentum, too, takes in the averaged
gradient, which is there uncompressed, so nothing else needs to be sent.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.buckets import DEFAULT_BUCKET_BYTES
from penstock.compression.optim._bucket import Denominator, FlatBucket, accept_gradient
from penstock.compression.optim._exchanging import ExchangingOptimizer
from penstock.compression.optim.onebit_adam import check_freeze
from penstock.compression.optim.zero_one_schedule import ZeroOneSchedule
from penstock.compression.rules import ParameterRules

_MOVED, _MOMENTUM, _RATES, _STEPS = "moved", "exp_avg", "rates", "steps"
_OF_A_ROUND: Final = (_MOVED, _MOMENTUM, _RATES, _STEPS)


class ZeroOneAdam(ExchangingOptimizer):
    """Adam whose replicas exchange compressed momentum, and later only at some steps.

    Use it as :class:`OneBitAdam`: same initial parameters everywhere, each replica's own gradient in ``.grad``. As
    long as every step updates the variance (``var_update_scaler`` steps) it is bitwise AdamW on the averaged gradient.

    Between two exchanges the replicas' parameters differ. What they agree on, the parameters of the last exchange, is
    ``master`` in the state, and :meth:`common_weights` puts it into the parameters for a while: evaluate there. A
    checkpoint in the middle of a round needs :meth:`error_state` of every rank to go on bit for bit. So is a gradient
    that is not finite told when it is exchanged, maybe some steps later: go back to a checkpoint then.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; schedulers may change each group's.
        betas: Decay rates of momentum and variance.
        eps: Added to the root of the variance.
        weight_decay: Decoupled, as in AdamW.
        var_freeze_step: The last step at which the variance may be updated; the end of the learning rate's warm-up
            is usual.
        var_update_scaler: The interval between updates of the variance doubles after so many of them (kappa).
        local_step_scaler: Once the variance is frozen, the interval between exchanges doubles after so many steps.
        local_step_clipper: The largest interval between exchanges (H); 1 exchanges at every step.
        bias_correction: As in Adam; False is the paper's and DeepSpeed's update.
        variance_floor: Floor under the variance's root where momentum is compressed; see :class:`OneBitAdam`.
        group: The replicas; None is the default group, or one replica where there is none.
        algorithm: Compressor of the momentum, or its registered name; None is ``onebit``.
        rules: Which parameters' momentum is exchanged uncompressed, in buckets of their own; None compresses all.
            Patterns go by name: give ``model.named_parameters()``.
        masks: By parameter name, where a gradient may ever be (True), of the parameter's shape or one that broadcasts
            to it, ``[rows, 1]`` for rows: elsewhere compression would make one of its scale, which is cut off.
        bucket_bytes: Target size of a bucket.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Attributes:
        schedule: When the variance is updated and when replicas exchange.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        var_freeze_step: int = 100_000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
        *,
        bias_correction: bool = True,
        variance_floor: float = 0.05,
        group: dist.ProcessGroup | None = None,
        algorithm: CompressionAlgorithm | str | None = None,
        rules: ParameterRules | None = None,
        masks: Mapping[str, Tensor] | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.schedule = ZeroOneSchedule(var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper)
        check_freeze(var_freeze_step, variance_floor)
        self.bias_correction = bias_correction
        self.variance_floor = variance_floor
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            states=(_MOMENTUM, "exp_avg_sq"),
            masters=True,
            group=group,
            algorithm=algorithm,
            rules=rules,
            masks=masks,
            bucket_bytes=bucket_bytes,
            meter=meter,
            watcher=watcher,
        )
        self._rounds = [_Round(bucket) for bucket in self._all_buckets()]

    @property
    def compressing(self) -> bool:
        """Whether the next step sends compressed momentum, or nothing."""
        return not self.schedule.updates_variance(self._steps_done() + 1)

    @property
    def in_round(self) -> bool:
        """Whether the replicas have stepped by themselves since the last exchange, so that they differ now."""
        return any(part.steps for part in self._rounds)

    def _advance(self, step: int) -> None:
        if self.schedule.updates_variance(step):
            self._adam_step(step)
        else:
            self._momentum_step(step)

    @torch.no_grad()
    def synchronize(self) -> None:
        """End the round that the replicas are in, whatever the step: after it their parameters are the same.

        Collective. For the end of training, so that the common parameters hold the last steps, too; where the replicas
        have just exchanged it does nothing.

        Raises:
            FloatingPointError: What was exchanged holds a NaN or infinity.
        """
        if not self.in_round:
            return
        step = self._steps_done()
        self._end_round(step, undoable=False)
        for part in self._rounds:
            self._meet(part, step)

    @contextmanager
    def common_weights(self) -> Iterator[None]:
        """Within it the parameters are those on which all replicas agree: as of the last exchange."""
        with torch.no_grad():
            for part in self._rounds:
                if not part.steps:
                    part.bucket.adopt_parameters()
                part.bucket.publish()
        try:
            yield
        finally:
            with torch.no_grad():
                for part in self._rounds:
                    self._place(part, self._steps_done())

    def error_state(self) -> dict[str, Any]:
        """This rank's error memories and, in the middle of a round, its momentum and what it has moved; not copies."""
        state = super().error_state()
        if self.in_round:
            state[_RATES] = [part.rates for part in self._rounds]
            state[_STEPS] = [part.steps for part in self._rounds]
            for index, part in enumerate(self._rounds):
                state[f"bucket_{index:03d}.{_MOVED}"] = part.bucket.exchanged
                state[f"bucket_{index:03d}.{_MOMENTUM}"] = part.momentum
        return state

    @torch.no_grad()
    def load_error_state(self, state: Mapping[str, Any]) -> bool:
        """Restore what belongs to this rank bit for bit, after :meth:`load_state_dict`; it moves the parameters, too.

        Returns:
            False if it belongs to another layout: then memories start from zero and the round from the last exchange.
        """
        local = {name: value for name, value in state.items() if name.endswith(_OF_A_ROUND)}
        fits = super().load_error_state({name: value for name, value in state.items() if name not in local})
        rates, steps = list(local.get(_RATES, [])), list(local.get(_STEPS, []))
        in_round = fits and len(rates) == len(steps) == len(self._rounds)
        for index, part in enumerate(self._rounds):
            part.rates = float(rates[index]) if in_round else 0.0
            part.steps = int(steps[index]) if in_round else 0
            if in_round:
                part.bucket.exchanged.copy_(local[f"bucket_{index:03d}.{_MOVED}"])
                part.momentum.copy_(local[f"bucket_{index:03d}.{_MOMENTUM}"])
                part.new_momentum.copy_(part.momentum)
            self._place(part, self._steps_done())
        if in_round:
            self._check_start = None  # the replicas go on apart
        return fits and (in_round or not local)

    def load_error_states(self, states: Sequence[Mapping[str, Any]]) -> bool:
        """Take over what another number of replicas owed; a round that they were in begins anew."""
        return super().load_error_states(
            [{name: value for name, value in state.items() if not name.endswith(_OF_A_ROUND)} for state in states]
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments, common parameters, step and hyperparameters, copying into existing storage.

        The parameters become the common ones; :meth:`load_error_state` takes a rank to where it was in its round.

        Raises:
            ValueError: Groups, parameters or shapes differ, or the parameters' step counts do.
        """
        super().load_state_dict(state_dict)
        with torch.no_grad():
            for part in self._rounds:
                part.rates, part.steps = 0.0, 0
                part.bucket.publish()

    def _adam_step(self, step: int) -> None:
        for bucket in self._all_buckets():
            bucket.fill()
        self._exchange(compressed=False)
        self._refuse_non_finite(step)
        for part in self._rounds:
            bucket, param_group = part.bucket, self._group_of(part.bucket)
            beta1, beta2 = param_group["betas"]
            accept_gradient(bucket, beta1, beta2)
            part.denominator.follow(self._variance_correction(beta2, step), float(param_group["eps"]))
            bucket.adopt_parameters()
            rate, shrink = self._rate(param_group, step)
            part.shrink(shrink)
            part.step(bucket.views[_MOMENTUM], rate)
            bucket.publish()

    def _momentum_step(self, step: int) -> None:
        for part in self._rounds:
            rate, shrink = self._rate(self._group_of(part.bucket), step)
            part.move(rate, shrink, beta1=self._group_of(part.bucket)["betas"][0])
        if self.schedule.exchanges(step):
            self._end_round(step, undoable=all(part.steps == 1 for part in self._rounds))
        for part in self._rounds:
            part.shrink(self._rate(self._group_of(part.bucket), step)[1])
            if self.schedule.exchanges(step):
                self._meet(part, step)
            else:
                part.momentum.copy_(part.new_momentum)
                self._place(part, step)

    def _meet(self, part: "_Round", step: int) -> None:
        """The common parameters and the momentum follow the average of what the replicas have moved."""
        self._freeze(part, step)
        part.end()
        part.bucket.publish()

    def _end_round(self, step: int, *, undoable: bool) -> None:
        """Average what the replicas have moved.

        Args:
            step: Counted from 1.
            undoable: The round is of this one step, of which parameters and moments know nothing yet.

        Raises:
            FloatingPointError: Something of it is not finite.
        """
        # While no rate of a group was positive nothing of it has moved; its momentum is then averaged as it is, and
        # uncompressed, because error memories are in units of what moves.
        moved = [bool(part.rates) for part in self._rounds]
        for part in self._rounds:
            if not part.rates:
                part.bucket.exchanged.copy_(part.new_momentum)
        # A round that is ended early is exchanged when its last step is done, which is where the next step begins: it
        # makes random choices of its own.
        self._exchange(compressed=moved, key=None if self._steps_done() < step else -step)
        if undoable:
            rates = [part.rates for part in self._rounds]
            for part in self._rounds:
                part.rates, part.steps = 0.0, 0  # if it is refused now, there was no round
        self._refuse_non_finite(
            step,
            "parameters and moments are as before this step"
            if undoable
            else "the replicas have gone apart since the last exchange: go back to a checkpoint",
        )
        if undoable:
            for part, rate in zip(self._rounds, rates, strict=True):
                part.rates, part.steps = rate, 1

    def _place(self, part: "_Round", step: int) -> None:
        """Put the parameters where this replica has moved to from the common ones."""
        if not part.steps:
            return
        self._freeze(part, step)
        bucket = part.bucket
        placed = bucket.trainable(
            bucket.layout.parameters, bucket.weights, bucket.exchanged_views, part.denominator.views
        )
        for parameter, start, way, divisor in zip(*placed, strict=True):
            parameter.copy_(torch.addcdiv(start, way, divisor, value=-1.0))

    def _freeze(self, part: "_Round", step: int) -> None:
        """Prepare the denominator of steps that leave the variance as it is."""
        param_group = self._group_of(part.bucket)
        correction = self._variance_correction(param_group["betas"][1], step)
        part.denominator.freeze(correction, float(param_group["eps"]), self.variance_floor)

    def _variance_correction(self, beta2: float, step: int) -> float:
        updates = self.schedule.variance_updates(step)
        return float((1 - beta2**updates) ** 0.5) if self.bias_correction and updates else 1.0

    def _rate(self, param_group: Mapping[str, Any], step: int) -> tuple[float, float]:
        """The corrected rate of a step, and the factor by which weight decay shrinks."""
        lr = float(param_group["lr"])
        correction = 1 - param_group["betas"][0] ** step if self.bias_correction else 1.0
        return lr / correction, 1 - lr * param_group["weight_decay"]


class _Round:
    """A bucket on its way from one exchange to the next.

    Its exchange buffer holds what this replica has moved, times the denominator.

    Attributes:
        rates: Sum of the rates in this round, shrunk by weight decay as what was moved is; 0 between rounds, and until
            a rate is positive.
        steps: Steps in this round; 0 between rounds.
        new_momentum: This replica's momentum after its own gradient of this step, ``[numel]``.
    """

    def __init__(self, bucket: FlatBucket) -> None:
        self.bucket = bucket
        self.denominator = Denominator(bucket.layout, bucket.states["exp_avg_sq"])
        self.momentum = bucket.states[_MOMENTUM]
        self.new_momentum = bucket.layout.new_flat()
        self.rates = 0.0
        self.steps = 0
        self._gradient_views = bucket.layout.views(self.new_momentum)

    def move(self, rate: float, shrink: float, *, beta1: float) -> None:
        """Take this replica's own step."""
        self.bucket.copy_gradients(self._gradient_views)
        torch.lerp(self.momentum, self.new_momentum, 1 - beta1, out=self.new_momentum)
        if not self.steps:
            self.bucket.adopt_parameters()
            self.bucket.exchanged.zero_()
        elif shrink != 1.0:
            self.bucket.exchanged.mul_(shrink)
        self.bucket.exchanged.add_(self.new_momentum, alpha=rate)
        self.rates = self.rates * shrink + rate
        self.steps += 1

    def shrink(self, factor: float) -> None:
        """Decay the common parameters."""
        (common,) = self.bucket.trainable(self.bucket.weights)
        if factor != 1.0 and common:
            torch._foreach_mul_(common, factor)

    def step(self, direction: list[Tensor], rate: float) -> None:
        """Move the common parameters along one view for each parameter, over the denominator."""
        common, along, divisors = self.bucket.trainable(self.bucket.weights, direction, self.denominator.views)
        if common:
            torch._foreach_addcdiv_(common, along, divisors, value=-rate)

    def end(self) -> None:
        """The replicas' average is in the exchange buffer: the common parameters and the momentum follow it."""
        self.bucket.clear_gaps()
        if self.rates:
            self.step(self.bucket.exchanged_views, 1.0)
        torch.div(self.bucket.exchanged, self.rates or 1.0, out=self.momentum)
        self.rates, self.steps = 0.0, 0
