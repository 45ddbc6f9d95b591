"""1-bit Adam: momentum on the wire as signs, once the variance has settled.

Tang, Gan, Awan, Rajbhandari, Li, Lian, Liu, Zhang, He, "1-bit Adam: communication efficient large-scale training with
Adam's convergence speed", ICML 2021 (arXiv:2102.02888), Algorithm 1. For ``freeze_step`` steps it is Adam with
averaged gradients. Then the variance ``v`` is frozen, each replica ``i`` advances the common momentum with its own
gradient, ``m_i = beta1 m + (1 - beta1) g_i``, and the new common momentum is the average of the ``m_i`` by a
compressed all-reduce with error feedback on both of its sides. Compressing ``m`` works where compressing ``g`` under
Adam does not, because with ``v`` frozen the update is linear in ``m``: errors fed back later cancel errors made now.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.buckets import DEFAULT_BUCKET_BYTES, make_buckets
from penstock.compression.error_feedback import memory_dtype
from penstock.compression.optim._momentum import MomentumBucket
from penstock.compression.registry import create_compression_algorithm
from penstock.compression.same_start import check_same_start

_log = logging.getLogger(__name__)


class OneBitAdam(Optimizer):
    """Adam that communicates by itself: averaged gradients at first, compressed momentum later.

    Give every replica the same initial parameters and do *not* average gradients elsewhere: :meth:`step` expects in
    ``.grad`` the replica's own gradient, whose mean over the replicas is the gradient to descend. A parameter without
    a gradient counts as having zeros, because the other replicas may have one; a parameter that does not require one
    is left alone. Parameters stay bitwise equal on all replicas. With one replica nothing is sent, so nothing is
    compressed: Adam with a variance that freezes. Moments of half-precision parameters are float32, but there is no
    float32 copy of the parameters themselves.

    The warm-up is bitwise ``torch.optim.AdamW`` (for float32 and float64) on the averaged gradient, with decoupled
    weight decay, and goes on from AdamW's state dict. Parameter groups never share a bucket; put each tied weight,
    whose copies lie on several pipeline stages, in a group of its own.

    A frozen variance needs care where it is tiny beside its neighbours', as in embedding rows hardly seen before the
    freeze: there the neighbours' scale, divided by the row's own deviation, would be a huge step. So the root of the
    frozen variance is raised to ``variance_floor`` times its mean over the 1,024 consecutive elements around it. This
    keeps the update linear in the momentum, so that errors still cancel. A floor of 0 gives the paper's update. Where
    there is no variance at all (nor a neighbour's), an element stays where it is but for weight decay.

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
        algorithm: Compressor of the momentum; None is ``onebit``.
        bucket_bytes: Target size of a bucket.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Raises:
        ValueError: An argument is out of range.
    """

    owns_exchange = True

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
        algorithm: CompressionAlgorithm | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        meter: Meter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        if freeze_step < 1:
            raise ValueError(f"freeze_step must be at least 1 (the variance needs a gradient), got {freeze_step}")
        if not 0.0 <= variance_floor <= 1.0:
            raise ValueError(f"variance_floor must be in [0, 1], got {variance_floor}")
        self.freeze_step = freeze_step
        self.bias_correction = bias_correction
        self.variance_floor = variance_floor
        self._buckets: list[MomentumBucket] | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for param_group in self.param_groups:
            _check_group(param_group)
        layout = make_buckets(
            [
                [(f"group {g}, parameter {i}", p) for i, p in enumerate(param_group["params"])]
                for g, param_group in enumerate(self.param_groups)
            ],
            bucket_bytes=bucket_bytes,
            flat_dtype=memory_dtype,
            reverse=False,
        )
        compressor = create_compression_algorithm("onebit") if algorithm is None else algorithm
        self._buckets = [MomentumBucket(bucket, compressor, group, meter=meter, watcher=watcher) for bucket in layout]
        self._check_start: Callable[[], None] | None = self._start_check(group, meter, watcher)
        self._expose_state()

    @property
    def compressing(self) -> bool:
        """Whether the next step sends compressed momentum."""
        return self._steps_done() >= self.freeze_step

    def bind_exchange(
        self, *, group: dist.ProcessGroup | None, replicas: int, meter: Meter | None, watcher: Watcher | None
    ) -> None:
        """Say who the replicas are after all; for an engine that is given the optimizer ready-made.

        Args:
            group: The replicas; None with ``replicas=1``, for one replica of several ranks.
            replicas: How many there are.
            meter: Counts bytes and waiting seconds.
            watcher: Bounds the waits.

        Raises:
            ValueError: The first step is done: error memories would be lost.
        """
        if self._steps_done():
            raise ValueError(f"the exchange is bound before the first step, but {self._steps_done()} were made")
        for bucket in self._all_buckets():
            bucket.bind(group, alone=replicas == 1, meter=meter, watcher=watcher)
        self._check_start = None if replicas == 1 else self._start_check(group, meter, watcher)

    def _start_check(
        self, group: dist.ProcessGroup | None, meter: Meter | None, watcher: Watcher | None
    ) -> Callable[[], None]:
        parameters = [p for param_group in self.param_groups for p in param_group["params"]]
        return lambda: check_same_start(parameters, group, meter=meter, watcher=watcher)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are given when the optimizer is made.

        Raises:
            ValueError: The buckets exist already.
        """
        if getattr(self, "_buckets", None) is not None:
            raise ValueError(
                "OneBitAdam lays out its buckets when it is made: pass all parameter groups to the constructor"
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Exchange and update; every replica must call it.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            ValueError: Before the first step: the replicas hold different parameters.
            FloatingPointError: A gradient or momentum holds a NaN or infinity on some replica. Raised on every
                replica, with parameters, moments and step count untouched; error memories of the elements it
                touched start again from zero.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._check_start is not None:
            self._check_start()
            self._check_start = None
        step = self._steps_done() + 1
        warming_up = step <= self.freeze_step
        buckets = self._all_buckets()
        for bucket in buckets:
            bucket.fill()
            if not warming_up:
                bucket.advance_momentum(beta1=self._group_of(bucket)["betas"][0])
            bucket.reduction(compressed=not warming_up).start()
        for bucket in buckets:
            bucket.reduction(compressed=not warming_up).advance()
        for bucket in buckets:
            bucket.reduction(compressed=not warming_up).wait()
        self._refuse_non_finite(buckets, step)
        for bucket in buckets:
            self._update(bucket, step, warming_up=warming_up)
        for state in self.state.values():
            state["step"] += 1
        return loss

    def error_state(self) -> dict[str, Tensor]:
        """This rank's error memories, by bucket: ``bucket_000.worker``, ``bucket_000.server``; not copies."""
        return {
            f"bucket_{index:03d}.{name}": tensor
            for index, bucket in enumerate(self._all_buckets())
            for name, tensor in bucket.memory_tensors().items()
        }

    def load_error_state(self, state: Mapping[str, Tensor]) -> bool:
        """Restore this rank's error memories bit for bit, in place.

        Returns:
            True. False if the memories belong to another layout (other parameters, groups, bucket size or number of
            replicas): then all of them start from zero, which costs one compression's worth of error, and a warning
            is logged.
        """
        mine = self.error_state()
        fits = mine.keys() == state.keys() and all(
            mine[name].shape == state[name].shape and mine[name].dtype == state[name].dtype for name in mine
        )
        if not fits:
            _log.warning(
                "the saved error memories (%d tensors) do not fit this run's buckets (%d tensors): parameters, "
                "groups, bucket size or replicas differ; starting with empty memories",
                len(state),
                len(mine),
            )
        for name, memory in mine.items():
            if fits:
                memory.copy_(state[name])
            else:
                memory.zero_()
        return fits

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments, step and hyperparameters, copying into existing storage; also from AdamW's state dict.

        Error memories are each rank's own and are not in it; see :meth:`load_error_state`.

        Raises:
            ValueError: Groups, parameters or shapes differ, or the parameters' step counts do, or the state is Adam's
                and went on beyond ``freeze_step``.
        """
        saved: dict[int, dict[str, Any]] = state_dict["state"]
        self._check_variance(saved, state_dict["param_groups"])
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for param_group in self.param_groups:
            param_group.pop("amsgrad", None)  # Adam's mark, see _check_variance
            _check_group(param_group)
        self._expose_state()
        steps = {float(entry["step"]) for entry in saved.values()}
        if len(steps) > 1:
            raise ValueError(f"OneBitAdam counts one step for all parameters, but the saved ones are {sorted(steps)}")
        indices = [index for saved_group in state_dict["param_groups"] for index in saved_group["params"]]
        parameters = [p for param_group in self.param_groups for p in param_group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            entry, mine = saved.get(index), self.state[parameter]
            mine["step"].fill_(next(iter(steps), 0.0))
            for name in ("exp_avg", "exp_avg_sq"):
                if entry is None:  # AdamW has no state for a parameter that never had a gradient
                    mine[name].zero_()
                    continue
                if entry[name].shape != parameter.shape:
                    raise ValueError(
                        f"the saved {name} of parameter {index} has shape {tuple(entry[name].shape)}, "
                        f"the parameter {tuple(parameter.shape)}"
                    )
                mine[name].copy_(entry[name])

    def _check_variance(self, saved: Mapping[int, Mapping[str, Any]], groups: Iterable[Mapping[str, Any]]) -> None:
        """A variance that took in gradients after ``freeze_step`` would be corrected as if it had not."""
        adams = any("amsgrad" in param_group for param_group in groups)  # an option that OneBitAdam has not
        step = max((int(entry["step"]) for entry in saved.values()), default=0)
        if adams and self.bias_correction and step > self.freeze_step:
            raise ValueError(
                f"the state is Adam's after {step} steps, but freeze_step={self.freeze_step} says that the variance is "
                f"of the first {self.freeze_step}; make OneBitAdam with freeze_step={step} (to compress from here on) "
                "or more"
            )

    def _expose_state(self) -> None:
        """Fill ``self.state`` in torch's standard format with views into the flat buffers."""
        views: dict[nn.Parameter, dict[str, Tensor]] = {}
        for bucket in self._all_buckets():
            views.update(bucket.state_views())
        for param_group in self.param_groups:
            for parameter in param_group["params"]:
                self.state[parameter] = {"step": torch.tensor(0.0), **views[parameter]}

    def _update(self, bucket: MomentumBucket, step: int, *, warming_up: bool) -> None:
        param_group = self._group_of(bucket)
        beta1, beta2 = param_group["betas"]
        lr, eps = float(param_group["lr"]), float(param_group["eps"])
        correction1 = 1 - beta1**step if self.bias_correction else 1.0
        correction2 = 1 - beta2 ** min(step, self.freeze_step) if self.bias_correction else 1.0
        if warming_up:
            bucket.accept_gradient(beta1, beta2)
            denominator = bucket.denominator(correction2**0.5, eps)
        else:
            bucket.accept_momentum()
            denominator = bucket.frozen_denominator(correction2**0.5, eps, self.variance_floor)
        bucket.update(denominator, step_size=lr / correction1, shrink=1 - lr * param_group["weight_decay"])

    def _refuse_non_finite(self, buckets: list[MomentumBucket], step: int) -> None:
        # The exchanged values have the same bits on every replica, so all of them raise or none does.
        for bucket in buckets:
            if not bucket.exchanged_is_finite():
                raise FloatingPointError(
                    f"step {step}: a gradient holds a NaN or infinity on some replica (group "
                    f"{bucket.layout.set_index}); parameters and moments are as before this step"
                )

    def _group_of(self, bucket: MomentumBucket) -> dict[str, Any]:
        return self.param_groups[bucket.layout.set_index]

    def _all_buckets(self) -> list[MomentumBucket]:
        assert self._buckets is not None
        return self._buckets

    def _steps_done(self) -> int:
        first = next(iter(self.state.values()))  # all count alike; a group may be empty, the optimizer may not
        return int(first["step"])


def _check_group(param_group: Mapping[str, Any]) -> None:
    beta1, beta2 = param_group["betas"]
    if not 0.0 <= beta1 < 1.0 or not 0.0 <= beta2 < 1.0:
        raise ValueError(f"betas must be in [0, 1), got {(beta1, beta2)}")
    for name in ("lr", "eps", "weight_decay"):
        if not float(param_group[name]) >= 0.0:
            raise ValueError(f"{name} must not be negative, got {param_group[name]}")
    for parameter in param_group["params"]:
        if not parameter.is_floating_point():
            raise ValueError(f"OneBitAdam takes real floating parameters, got {parameter.dtype}")
