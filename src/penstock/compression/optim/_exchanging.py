"""What the optimizers that communicate by themselves have in common: buckets, exchange, errors, state."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.algorithms.none import NoCompression
from penstock.compression.buckets import NamedParameter, make_buckets
from penstock.compression.error_feedback import memory_dtype
from penstock.compression.error_memory import empty_memories
from penstock.compression.grad_scaler import gradient_scale, overflowed
from penstock.compression.group import ranks_of
from penstock.compression.masks import check_masks
from penstock.compression.optim._bucket import MASTER, FlatBucket
from penstock.compression.rechunk import rechunked
from penstock.compression.registry import create_compression_algorithm
from penstock.compression.rules import ParameterRules, split_by
from penstock.compression.same_start import check_same_start

_log = logging.getLogger(__name__)


class ExchangingOptimizer(Optimizer, ABC):
    """An optimizer that averages over the replicas itself, bucket by bucket.

    Args:
        params: Parameters or parameter groups; parameters of different groups never share a bucket.
        defaults: Torch's defaults of the groups: ``lr``, ``eps``, ``weight_decay``, ``betas`` and others.
        states: Names of the element-wise states.
        masters: Keep a copy of all parameters; half-precision ones have one in any case.
        compress_alone: Compress with a memory on one replica, too.
        group: The replicas; None is the default group, or one replica where there is none.
        algorithm: Compressor, or its registered name; None is ``onebit``.
        rules: Which parameters are exchanged uncompressed, in buckets of their own; None compresses all.
        masks: By parameter name, where a gradient may ever be (True), of the parameter's shape or one that broadcasts
            to it.
        bucket_bytes: Target size of a bucket.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.
    """

    owns_exchange = True
    _step_supports_amp_scaling = True  # so that with a GradScaler, too, all replicas step or none does

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        states: Sequence[str],
        masters: bool = False,
        compress_alone: bool = False,
        group: dist.ProcessGroup | None,
        algorithm: CompressionAlgorithm | str | None,
        rules: ParameterRules | None = None,
        masks: Mapping[str, Tensor] | None = None,
        bucket_bytes: int,
        meter: Meter | None,
        watcher: Watcher | None,
    ) -> None:
        self._buckets: list[FlatBucket] | None = None
        super().__init__(params, defaults)
        for param_group in self.param_groups:
            self._check_group(param_group)
        named = "onebit" if algorithm is None else algorithm
        compressor = create_compression_algorithm(named) if isinstance(named, str) else named
        sets = self._named_parameters(rules, masks)
        check_masks(masks or {}, {name for of_group in sets for name, _ in of_group})
        split = [split_by(rules, of_group) for of_group in sets]
        planned = [
            (layout, chosen)
            for parts, chosen in zip(zip(*split, strict=True), (compressor, NoCompression()), strict=True)
            for layout in make_buckets(parts, bucket_bytes=bucket_bytes, flat_dtype=memory_dtype, reverse=False)
        ]
        self._buckets = [
            FlatBucket(
                layout,
                chosen,
                group,
                states=states,
                masters=masters,
                compress_alone=compress_alone,
                masks=masks,
                meter=meter,
                watcher=watcher,
            )
            for layout, chosen in planned
        ]
        self._check_start: Callable[[], None] | None = self._start_check(group, meter, watcher)
        self._overflowed = partial(overflowed, self, group, alone=ranks_of(group) == 1, meter=meter, watcher=watcher)
        self._expose_state()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Exchange and update; every replica must call it.

        With a ``torch.amp.GradScaler`` on every replica, no replica steps where a gradient of any overflowed.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            ValueError: Before the first step: the replicas hold different parameters.
            FloatingPointError: What was exchanged holds a NaN or infinity, because a gradient did on some replica.
                Raised on every replica; the message says what became of parameters and moments.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_first_step()
        if self._overflowed():
            return loss
        for bucket in self._all_buckets():
            bucket.gradient_scale = gradient_scale(self)
        self._advance(self._steps_done() + 1)
        self._count_step()
        return loss

    @abstractmethod
    def _advance(self, step: int) -> None:
        """Exchange and update at a step, counted from 1."""

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
        self._overflowed = partial(overflowed, self, group, alone=replicas == 1, meter=meter, watcher=watcher)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are given when the optimizer is made.

        Raises:
            ValueError: The buckets exist already.
        """
        if getattr(self, "_buckets", None) is not None:
            raise ValueError(
                f"{type(self).__name__} lays out its buckets when it is made: pass all parameter groups to the "
                "constructor"
            )
        super().add_param_group(param_group)

    def error_state(self) -> dict[str, Any]:
        """This rank's error memories, by bucket: ``bucket_000.worker``, ``bucket_000.server``; not copies."""
        return {
            f"bucket_{index:03d}.{name}": tensor
            for index, bucket in enumerate(self._all_buckets())
            if bucket.memory is not None
            for name, tensor in bucket.memory.tensors().items()
        }

    def load_error_state(self, state: Mapping[str, Any]) -> bool:
        """Restore this rank's error memories bit for bit, in place.

        Returns:
            True. False if the memories belong to another layout (other parameters, groups, bucket size or number of
            replicas): then all of them start from zero, which costs one compression's worth of error, and a warning
            is logged.
        """
        mine = ExchangingOptimizer.error_state(self)
        fits = mine.keys() == state.keys() and all(
            mine[name].shape == state[name].shape and mine[name].dtype == state[name].dtype for name in mine
        )
        if not fits:
            _log.warning(
                "the saved error memories do not fit this run's: %s; parameters, groups, bucket size or the number of "
                "replicas differ, or they are another rank's; starting with empty memories",
                _difference(mine, state),
            )
            empty_memories(mine)
            return False
        for name, memory in mine.items():
            memory.copy_(state[name])
        return True

    def load_error_states(self, states: Sequence[Mapping[str, Any]]) -> bool:
        """Take over what another number of replicas owed: what is still owed to the average is what it was.

        Args:
            states: :meth:`error_state` of every old replica, in the order of the ranks.

        Returns:
            As for :meth:`load_error_state`.
        """
        buckets = self._all_buckets()
        memories = {f"bucket_{i:03d}": bucket.memory for i, bucket in enumerate(buckets) if bucket.memory is not None}
        replicas = buckets[0].replicas if buckets else 1
        return self.load_error_state(rechunked(states, memories, replicas=replicas))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore states, step and hyperparameters, copying into existing storage.

        What belongs to a rank alone is not in it; see :meth:`load_error_state`.

        Raises:
            ValueError: Groups, parameters or shapes differ, or the parameters' step counts do.
        """
        saved: dict[int, dict[str, Any]] = state_dict["state"]
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for param_group in self.param_groups:
            param_group.pop("amsgrad", None)  # Adam's, which this is not
            self._check_group(param_group)
        self._expose_state()
        steps = {float(entry["step"]) for entry in saved.values()}
        if len(steps) > 1:
            raise ValueError(
                f"{type(self).__name__} counts one step for all parameters, but the saved ones are {sorted(steps)}"
            )
        indices = [index for saved_group in state_dict["param_groups"] for index in saved_group["params"]]
        parameters = [p for param_group in self.param_groups for p in param_group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            entry, mine = saved.get(index), self.state[parameter]
            for name in mine:
                if name == "step":
                    mine[name].fill_(next(iter(steps), 0.0))
                elif entry is not None and name in entry:
                    _restore(mine[name], entry[name], f"{name} of parameter {index}", parameter)
                elif name == MASTER:
                    mine[name].copy_(parameter.detach())
                else:  # AdamW has no state for a parameter that never had a gradient
                    mine[name].copy_(self._initial(name))

    def _check_group(self, param_group: Mapping[str, Any]) -> None:
        if "betas" in param_group:
            beta1, beta2 = param_group["betas"]
            if not 0.0 <= beta1 < 1.0 or not 0.0 <= beta2 < 1.0:
                raise ValueError(f"betas must be in [0, 1), got {(beta1, beta2)}")
        for name in ("lr", "eps", "weight_decay"):
            if not float(param_group.get(name, 0.0)) >= 0.0:
                raise ValueError(f"{name} must not be negative, got {param_group[name]}")
        for parameter in param_group["params"]:
            if not parameter.is_floating_point():
                raise ValueError(f"{type(self).__name__} takes real floating parameters, got {parameter.dtype}")

    def _named_parameters(
        self, rules: ParameterRules | None, masks: Mapping[str, Tensor] | None
    ) -> list[list[NamedParameter]]:
        """Each group's parameters with their names, or places where the user gave none."""
        if (masks or (rules is not None and rules.full_precision)) and any(
            "param_names" not in param_group for param_group in self.param_groups if param_group["params"]
        ):
            raise ValueError(
                "rules.full_precision and masks go by parameters' names, which this optimizer was not given; make it "
                f"of named parameters: {type(self).__name__}(model.named_parameters(), ...)"
            )
        return [
            [
                (param_group["param_names"][i] if "param_names" in param_group else f"group {g}, parameter {i}", p)
                for i, p in enumerate(param_group["params"])
            ]
            for g, param_group in enumerate(self.param_groups)
        ]

    def _start_check(
        self, group: dist.ProcessGroup | None, meter: Meter | None, watcher: Watcher | None
    ) -> Callable[[], None]:
        parameters = [p for param_group in self.param_groups for p in param_group["params"]]
        return lambda: check_same_start(parameters, group, meter=meter, watcher=watcher)

    def _before_first_step(self) -> None:
        if self._check_start is not None:
            self._check_start()
            self._check_start = None

    def _extra_state(self, bucket: FlatBucket, index: int) -> dict[str, Tensor]:
        """What a parameter's state holds beside the bucket's element-wise ones: 0-dimensional tensors."""
        return {}

    def _initial(self, name: str) -> float:
        """The value with which a state begins."""
        return 0.0

    def _expose_state(self) -> None:
        """Fill ``self.state`` in torch's standard format with views into the flat buffers."""
        views: dict[nn.Parameter, dict[str, Tensor]] = {}
        for bucket in self._all_buckets():
            for index, (parameter, states) in enumerate(bucket.state_views().items()):
                views[parameter] = {**states, **self._extra_state(bucket, index)}
        for param_group in self.param_groups:
            for parameter in param_group["params"]:
                self.state[parameter] = {"step": torch.tensor(0.0), **views[parameter]}

    def _exchange(self, *, compressed: bool | Sequence[bool], key: int | None = None) -> None:
        """Average the exchange buffers of all buckets.

        Args:
            compressed: Compressed or not; a sequence says it for each.
            key: Of random choices; None is the number of steps done.
        """
        buckets = self._all_buckets()
        each = [compressed] * len(buckets) if isinstance(compressed, bool) else compressed
        reductions = [bucket.reduction(compressed=which) for bucket, which in zip(buckets, each, strict=True)]
        for reduction in reductions:
            reduction.start(self._steps_done() if key is None else key)
        for reduction in reductions:
            reduction.advance()
        for reduction in reductions:
            reduction.wait()
        for bucket in buckets:
            bucket.cut_off()

    def _refuse_non_finite(self, step: int, standing: str = "parameters and moments are as before this step") -> None:
        # The exchanged values have the same bits on every replica, so all of them raise or none does.
        for bucket in self._all_buckets():
            if not bucket.exchanged_is_finite():
                raise FloatingPointError(
                    f"step {step}: a gradient holds a NaN or infinity on some replica (group "
                    f"{bucket.layout.set_index}); {standing}"
                )

    def _count_step(self) -> None:
        for state in self.state.values():
            state["step"] += 1

    def _group_of(self, bucket: FlatBucket) -> dict[str, Any]:
        return self.param_groups[bucket.layout.set_index]

    def _all_buckets(self) -> list[FlatBucket]:
        assert self._buckets is not None
        return self._buckets

    def _steps_done(self) -> int:
        first = next(iter(self.state.values()))  # all count alike; a group may be empty, the optimizer may not
        return int(first["step"])


def _difference(mine: Mapping[str, Tensor], saved: Mapping[str, Any]) -> str:
    """The first of the memories that are not alike."""
    for name in sorted(mine.keys() | saved.keys()):
        here, there = (list(state[name].shape) if name in state else None for state in (mine, saved))
        if here != there:
            return (
                f"{name} is {'missing' if here is None else here}, and saved {'not at all' if there is None else there}"
            )
    return "the dtypes differ"


def _restore(mine: Tensor, saved: Tensor, what: str, parameter: Tensor) -> None:
    if saved.shape != mine.shape:
        raise ValueError(
            f"the saved {what} has shape {tuple(saved.shape)}, the parameter {tuple(parameter.shape)}"
            if mine.shape == parameter.shape
            else f"the saved {what} has shape {tuple(saved.shape)}, this one {tuple(mine.shape)}"
        )
    mine.copy_(saved)
