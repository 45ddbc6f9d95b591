"""1-bit LAMB: large-batch training with a rate for each layer, and momentum on the wire as signs.

Li, Awan, Tang, Rajbhandari, He, "1-bit LAMB: communication efficient large-scale large-batch training with LAMB's
convergence speed", HiPC 2022 (arXiv:2104.06069), Algorithm 1, over You et al., "Large batch optimization for deep
learning: training BERT in 76 minutes", ICLR 2020. For ``freeze_step`` steps it is LAMB with averaged gradients, while a
running average of each layer's coefficient is kept. Then the variance is frozen and the momentum compressed, as in
1-bit Adam. The layer's coefficient goes on from its running average, times how much the variance would have changed:
a *fresh* variance is kept from the gradients that the momenta tell of, ``(m_t - beta1 m_(t-1)) / (1 - beta1)``.

A momentum is brought to the scale of its bucket's others before it is compressed, so that layers which share a block's
scale do not drown one another.
"""

from collections.abc import Iterable, Mapping
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
from penstock.compression.optim.onebit_adam import VARIANCE_STEP, check_freeze, check_variance, note_variance
from penstock.compression.rules import ParameterRules

_MOMENTUM, _VARIANCE, _FRESH = "exp_avg", "exp_avg_sq", "exp_avg_sq_fresh"
_AVERAGE, _FACTOR, _SCALE = "coeff_average", "last_factor", "momentum_scale"
_SCALARS: Final = {_AVERAGE: 0.0, _FACTOR: 1.0, _SCALE: 1.0, VARIANCE_STEP: 0.0}
"""What a parameter's state holds beside its moments, and with what it begins."""


class OneBitLamb(ExchangingOptimizer):
    """LAMB that communicates by itself: averaged gradients at first, compressed momentum later.

    Use it as :class:`OneBitAdam`: same initial parameters everywhere, each replica's own gradient in ``.grad``. A layer
    is a parameter tensor.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; schedulers may change each group's.
        freeze_step: Steps of plain LAMB.
        betas: Decay rates of momentum and variance.
        eps: Added to the root of the variance.
        weight_decay: Part of the update whose norm the coefficient is about, as in LAMB.
        max_coeff: Largest coefficient of a layer during warm-up.
        min_coeff: Smallest.
        coeff_beta: Decay rate of the coefficient's running average; ``1 / (1 - coeff_beta)`` should not exceed
            ``freeze_step``.
        factor_max: Largest factor on the frozen coefficient.
        factor_min: Smallest.
        factor_threshold: Largest relative change of the factor from one step to the next.
        bias_correction: As in Adam and LAMB; False is DeepSpeed's update.
        variance_floor: Floor under the frozen variance's root; see :class:`OneBitAdam`.
        group: The replicas; None is the default group, or one replica where there is none.
        algorithm: Compressor of the momentum, or its registered name; None is ``onebit``.
        rules: Which parameters' momentum is exchanged uncompressed, in buckets of their own; None compresses all.
            Patterns go by name: give ``model.named_parameters()``.
        masks: By parameter name, where a gradient may ever be (True), of the parameter's shape or one that broadcasts
            to it, ``[rows, 1]`` for rows: elsewhere compression would make one of its scale, which is cut off.
        bucket_bytes: Target size of a bucket.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        freeze_step: int = 100_000,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
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
        check_freeze(freeze_step, variance_floor)
        if not 0.0 <= coeff_beta < 1.0:
            raise ValueError(f"coeff_beta must be in [0, 1), got {coeff_beta}")
        if not 0.0 <= factor_threshold < 1.0:
            raise ValueError(f"factor_threshold must be in [0, 1), got {factor_threshold}")
        if not 0.0 < factor_min <= factor_max:
            raise ValueError(f"factor_min={factor_min} and factor_max={factor_max} must be positive, the first smaller")
        self.freeze_step = freeze_step
        self.coeff_beta = coeff_beta
        self.factor_max = factor_max
        self.factor_min = factor_min
        self.factor_threshold = factor_threshold
        self.bias_correction = bias_correction
        self.variance_floor = variance_floor
        self._scalars: dict[int, list[dict[str, Tensor]]] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params,
            {**defaults, "max_coeff": max_coeff, "min_coeff": min_coeff},
            states=(_MOMENTUM, _VARIANCE, _FRESH),
            group=group,
            algorithm=algorithm,
            rules=rules,
            masks=masks,
            bucket_bytes=bucket_bytes,
            meter=meter,
            watcher=watcher,
        )
        buckets = self._all_buckets()
        self._denominators = [Denominator(bucket.layout, bucket.states[_VARIANCE]) for bucket in buckets]
        self._fresh = [Denominator(bucket.layout, bucket.states[_FRESH]) for bucket in buckets]

    @property
    def compressing(self) -> bool:
        """Whether the next step sends compressed momentum."""
        return self._steps_done() >= self.freeze_step

    def coefficients(self) -> dict[Tensor, float]:
        """The running average of each layer's coefficient, times its factor once the average is frozen."""
        return {
            parameter: float(state[_AVERAGE] * state[_FACTOR])
            for parameter, state in self.state.items()
            if isinstance(parameter, Tensor)
        }

    def _advance(self, step: int) -> None:
        warming_up = step <= self.freeze_step
        for bucket in self._all_buckets():
            bucket.fill()
            if not warming_up:
                beta1 = self._group_of(bucket)["betas"][0]
                torch.lerp(bucket.states[_MOMENTUM], bucket.exchanged, 1 - beta1, out=bucket.exchanged)
                for view, scalars in zip(bucket.exchanged_views, self._scalars[id(bucket)], strict=True):
                    view.mul_(scalars[_SCALE])
        self._exchange(compressed=not warming_up)
        self._refuse_non_finite(step)
        for index, bucket in enumerate(self._all_buckets()):
            bucket.adopt_parameters()
            if warming_up:
                self._lamb(bucket, self._denominators[index], step)
            else:
                self._frozen_lamb(bucket, self._denominators[index], self._fresh[index], step)
            bucket.publish()
        if warming_up:
            note_variance(self, step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments, coefficients, step and hyperparameters, as :meth:`OneBitAdam.load_state_dict` does.

        Raises:
            ValueError: Groups, parameters or shapes differ, or the parameters' step counts do, or the variance was
                not updated as often as ``freeze_step`` says.
        """
        check_variance(state_dict, self.freeze_step, type(self).__name__)
        super().load_state_dict(state_dict)
        note_variance(self, min(self._steps_done(), self.freeze_step))

    def _check_group(self, param_group: Mapping[str, Any]) -> None:
        super()._check_group(param_group)
        low, high = param_group["min_coeff"], param_group["max_coeff"]
        if not 0.0 < low <= high:
            raise ValueError(f"min_coeff={low} and max_coeff={high} must be positive, the first not the larger")

    def _extra_state(self, bucket: FlatBucket, index: int) -> dict[str, Tensor]:
        scalars = self._scalars.setdefault(
            id(bucket),
            [
                {name: torch.tensor(value, dtype=torch.float64) for name, value in _SCALARS.items()}
                for _ in bucket.layout.parameters
            ],
        )
        return scalars[index]

    def _initial(self, name: str) -> float:
        return _SCALARS.get(name, 0.0)

    def _lamb(self, bucket: FlatBucket, denominator: Denominator, step: int) -> None:
        param_group = self._group_of(bucket)
        beta1, beta2 = param_group["betas"]
        correction1, correction2 = self._corrections(param_group, step, step)
        accept_gradient(bucket, beta1, beta2)
        denominator.follow(correction2**0.5, float(param_group["eps"]))
        for place, weight in self._trainable(bucket):
            direction = torch.div(bucket.views[_MOMENTUM][place], denominator.views[place]).div_(correction1)
            direction.add_(weight, alpha=param_group["weight_decay"])
            coefficient = _ratio(weight, direction)
            if coefficient is None:
                coefficient = 1.0  # nothing to compare: the average is left as it is
            else:
                coefficient = min(max(coefficient, param_group["min_coeff"]), param_group["max_coeff"])
                self._scalars[id(bucket)][place][_AVERAGE].mul_(self.coeff_beta).add_(
                    coefficient, alpha=1 - self.coeff_beta
                )
            weight.add_(direction, alpha=-float(param_group["lr"]) * coefficient)
        if step == self.freeze_step:
            bucket.states[_FRESH].copy_(bucket.states[_VARIANCE])
            self._unite_scales(bucket)

    def _frozen_lamb(self, bucket: FlatBucket, denominator: Denominator, fresh: Denominator, step: int) -> None:
        param_group = self._group_of(bucket)
        beta1, beta2 = param_group["betas"]
        correction1, correction2 = self._corrections(param_group, step, self.freeze_step)
        bucket.clear_gaps()
        for view, scalars in zip(bucket.exchanged_views, self._scalars[id(bucket)], strict=True):
            view.div_(scalars[_SCALE])
        momentum = bucket.states[_MOMENTUM]
        gradient = momentum.mul_(-beta1).add_(bucket.exchanged).div_(1 - beta1)  # what the momenta tell of
        bucket.states[_FRESH].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        momentum.copy_(bucket.exchanged)
        eps = float(param_group["eps"])
        denominator.freeze(correction2**0.5, eps, self.variance_floor)
        fresh_correction = self._corrections(param_group, step, step)[1]
        fresh.freeze(fresh_correction**0.5, eps, self.variance_floor)
        for place, weight in self._trainable(bucket):
            direction = torch.div(bucket.views[_MOMENTUM][place], denominator.views[place])
            direction.div_(correction1)
            adams = float(torch.linalg.vector_norm(direction))
            direction.add_(weight, alpha=param_group["weight_decay"])
            factor = _largest_ratio(denominator.views[place], fresh.views[place])
            if param_group["weight_decay"] > 0.0:
                whole = float(torch.linalg.vector_norm(direction))
                share = min(1.0, adams / whole) if whole > 0 else 1.0
                factor = factor * share + (1.0 - share)
            scalars = self._scalars[id(bucket)][place]
            last = float(scalars[_FACTOR])
            factor = min(max(factor, self.factor_min), self.factor_max)
            factor = min(max(factor, last * (1.0 - self.factor_threshold)), last * (1.0 + self.factor_threshold))
            scalars[_FACTOR].fill_(factor)
            # A layer that was never compared has no average; it goes on as it went.
            coefficient = float(scalars[_AVERAGE]) * factor or 1.0
            weight.add_(direction, alpha=-float(param_group["lr"]) * coefficient)

    def _unite_scales(self, bucket: FlatBucket) -> None:
        """What to multiply each momentum with, so that all of a bucket have the same root mean square."""
        scales = [
            float(torch.linalg.vector_norm(view)) / max(1, view.numel()) ** 0.5 for view in bucket.views[_MOMENTUM]
        ]
        seen = [scale for scale in scales if scale > 0]
        for scale, scalars in zip(scales, self._scalars[id(bucket)], strict=True):
            # One alone stays as it is, to the bit: the copies of a tied weight have no neighbours on any stage.
            alone = len(seen) < 2
            scalars[_SCALE].fill_(1.0 if alone or scale == 0 else sum(seen) / len(seen) / scale)

    def _corrections(self, param_group: Mapping[str, Any], step: int, variance_step: int) -> tuple[float, float]:
        if not self.bias_correction:
            return 1.0, 1.0
        beta1, beta2 = param_group["betas"]
        return 1 - beta1**step, 1 - beta2**variance_step

    def _trainable(self, bucket: FlatBucket) -> list[tuple[int, Tensor]]:
        """Places and weights of the parameters that require a gradient."""
        return [
            (place, weight)
            for place, (weight, parameter) in enumerate(zip(bucket.weights, bucket.layout.parameters, strict=True))
            if parameter.requires_grad
        ]


def _ratio(weight: Tensor, direction: Tensor) -> float | None:
    """``|weight| / |direction|``; None where either is zero."""
    above, below = float(torch.linalg.vector_norm(weight)), float(torch.linalg.vector_norm(direction))
    return above / below if above > 0 and below > 0 else None


def _largest_ratio(frozen: Tensor, fresh: Tensor) -> float:
    """The largest element of ``frozen / fresh``, leaving out those that never had a gradient; 1 if all are such."""
    ratio = torch.where(torch.isfinite(frozen) & torch.isfinite(fresh), frozen / fresh, 0.0)
    largest = float(ratio.max()) if ratio.numel() else 0.0
    return largest if largest > 0 else 1.0
