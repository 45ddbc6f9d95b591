"""1-bit Adam: momentum on the wire as signs, once the variance has settled.

Tang, Gan, Awan, Rajbhandari, Li, Lian, Liu, Zhang, He, "1-bit Adam: communication efficient large-scale training with
Adam's convergence speed", ICML 2021 (arXiv:2102.02888), Algorithm 1. For ``freeze_step`` steps it is Adam with
averaged gradients. Then the variance ``v`` is frozen, each replica ``i`` advances the common momentum with its own
gradient, ``m_i = beta1 m + (1 - beta1) g_i``, and the new common momentum is the average of the ``m_i`` by a
compressed all-reduce with error feedback on both of its sides. Compressing ``m`` works where compressing ``g`` under
Adam does not, because with ``v`` frozen the update is linear in ``m``: errors fed back later cancel errors made now.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.buckets import DEFAULT_BUCKET_BYTES
from penstock.compression.optim._bucket import Denominator, FlatBucket, accept_gradient
from penstock.compression.optim._exchanging import ExchangingOptimizer
from penstock.compression.rules import ParameterRules

VARIANCE_STEP: Final = "variance_step"
"""Name in the state of how many of the first steps the variance is of."""


class OneBitAdam(ExchangingOptimizer):
    """Adam that communicates by itself: averaged gradients at first, compressed momentum later.

    Give every replica the same initial parameters and do *not* average gradients elsewhere: :meth:`step` expects in
    ``.grad`` the replica's own gradient, whose mean over the replicas is the gradient to descend. A parameter without
    a gradient counts as having zeros, because the other replicas may have one; a parameter that does not require one
    is left alone. Parameters stay bitwise equal on all replicas. With one replica nothing is sent, so nothing is
    compressed: Adam with a variance that freezes. Half-precision parameters have a float32 copy (``master`` in the
    state), which the updates are made to; their moments are float32 too.

    The warm-up is bitwise ``torch.optim.AdamW`` (for float32 and float64) on the averaged gradient, with decoupled
    weight decay, and goes on from AdamW's state dict. Parameter groups never share a bucket; put each tied weight,
    whose copies lie on several pipeline stages, in a group of its own.

    After the freeze the root of the variance is raised to ``variance_floor`` times its mean over the 1,024 consecutive
    elements around it: where it is tiny beside its neighbours', as in embedding rows hardly seen before the freeze,
    the neighbours' scale would be a huge step. A floor of 0 gives the paper's update. Where there is no variance at
    all (nor a neighbour's), an element stays where it is but for weight decay.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; schedulers may change each group's.
        freeze_step: Steps of plain Adam; roughly 15-25% of the run, and never before the learning rate has warmed up.
        betas: Decay rates of momentum and variance.
        eps: Added to the root of the variance.
        weight_decay: Decoupled, as in AdamW; applied after the freeze too.
        bias_correction: As in Adam, with the variance's correction frozen along with it; False is the paper's and
            DeepSpeed's update.
        variance_floor: See above; in [0, 1].
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
        self.freeze_step = freeze_step
        self.bias_correction = bias_correction
        self.variance_floor = variance_floor
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            states=("exp_avg", "exp_avg_sq"),
            group=group,
            algorithm=algorithm,
            rules=rules,
            masks=masks,
            bucket_bytes=bucket_bytes,
            meter=meter,
            watcher=watcher,
        )
        self._denominators = [Denominator(bucket.layout, bucket.states["exp_avg_sq"]) for bucket in self._all_buckets()]

    @property
    def compressing(self) -> bool:
        """Whether the next step sends compressed momentum."""
        return self._steps_done() >= self.freeze_step

    def _advance(self, step: int) -> None:
        warming_up = step <= self.freeze_step
        for bucket in self._all_buckets():
            bucket.fill()
            if not warming_up:
                beta1 = self._group_of(bucket)["betas"][0]
                torch.lerp(bucket.states["exp_avg"], bucket.exchanged, 1 - beta1, out=bucket.exchanged)
        self._exchange(compressed=not warming_up)
        self._refuse_non_finite(step)
        for bucket, denominator in zip(self._all_buckets(), self._denominators, strict=True):
            self._update(bucket, denominator, step, warming_up=warming_up)
        if warming_up:
            note_variance(self, step)

    def _extra_state(self, bucket: FlatBucket, index: int) -> dict[str, Tensor]:
        return {VARIANCE_STEP: torch.tensor(0.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments, step and hyperparameters, copying into existing storage; also from AdamW's state dict.

        Error memories are each rank's own and are not in it: they stay what they are. Where a run goes back, load
        those of then, too; see :meth:`load_error_state`.

        Raises:
            ValueError: Groups, parameters or shapes differ, or the parameters' step counts do, or the variance was
                not updated as often as ``freeze_step`` says.
        """
        check_variance(state_dict, self.freeze_step, type(self).__name__)
        super().load_state_dict(state_dict)
        note_variance(self, min(self._steps_done(), self.freeze_step))

    def _update(self, bucket: FlatBucket, denominator: Denominator, step: int, *, warming_up: bool) -> None:
        param_group = self._group_of(bucket)
        beta1, beta2 = param_group["betas"]
        lr, eps = float(param_group["lr"]), float(param_group["eps"])
        correction1 = 1 - beta1**step if self.bias_correction else 1.0
        correction2 = 1 - beta2 ** min(step, self.freeze_step) if self.bias_correction else 1.0
        if warming_up:
            accept_gradient(bucket, beta1, beta2)
            denominator.follow(correction2**0.5, eps)
        else:
            bucket.clear_gaps()
            bucket.states["exp_avg"].copy_(bucket.exchanged)
            denominator.freeze(correction2**0.5, eps, self.variance_floor)
        bucket.adopt_parameters()
        weights, momenta, denominators = bucket.trainable(bucket.weights, bucket.views["exp_avg"], denominator.views)
        shrink = 1 - lr * param_group["weight_decay"]
        if weights:
            if shrink != 1.0:
                torch._foreach_mul_(weights, shrink)
            torch._foreach_addcdiv_(weights, momenta, denominators, value=-lr / correction1)
        bucket.publish()


def check_freeze(freeze_step: int, variance_floor: float) -> None:
    """Refuse a freeze before the first gradient, and a floor above the mean."""
    if freeze_step < 1:
        raise ValueError(f"freeze_step must be at least 1 (the variance needs a gradient), got {freeze_step}")
    if not 0.0 <= variance_floor <= 1.0:
        raise ValueError(f"variance_floor must be in [0, 1], got {variance_floor}")


def check_variance(state_dict: Mapping[str, Any], freeze_step: int, optimizer: str) -> None:
    """Refuse a variance of other steps than the first ``freeze_step``: its correction would be that of another one."""
    adams = any("amsgrad" in param_group for param_group in state_dict["param_groups"])  # an option of Adam's alone
    entries = state_dict["state"].values()
    steps = {int(entry["step"]) for entry in entries}
    step = max(steps, default=0)
    counts = [int(entry[VARIANCE_STEP]) for entry in entries if VARIANCE_STEP in entry]
    if (not adams and not counts) or len(steps) > 1:
        return  # nothing says of which steps it is, or the state is refused for that
    updates = max(counts, default=step)
    if updates != min(step, freeze_step):
        whose = f"Adam's after {step} steps" if adams else f"of {step} steps with a variance of the first {updates}"
        remedy = "(to compress from here on) or more" if updates == step else "as it was made then"
        raise ValueError(
            f"the state is {whose}, but freeze_step={freeze_step} says that the variance is of the first "
            f"{min(step, freeze_step)}; make {optimizer} with freeze_step={updates} {remedy}"
        )


def note_variance(optimizer: Optimizer, step: int) -> None:
    """Keep with the state that the variance is of the first ``step`` steps."""
    for state in optimizer.state.values():
        state[VARIANCE_STEP].fill_(step)
