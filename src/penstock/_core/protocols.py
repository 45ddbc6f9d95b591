"""What the rooms agree on without importing one another."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class GradientExchange(Protocol):
    """Who communicates gradients over the data-parallel replicas, and when.

    One step goes: :meth:`begin_step`; backward passes; :meth:`arm` just before the last backward of some parameters,
    whose buckets may then start as soon as they are full; :meth:`ready` for parameters whose gradient became final
    without a backward hook (tied weights, summed by the engine; weight gradients computed late); :meth:`finish`, after
    which every ``parameter.grad`` is final. A reduction must start in a fixed order, the same on every rank.

    The gradient that results is ``sum over replicas of weight * (sum over local micro-batches)``.

    Attributes:
        averages_gradients: True when :meth:`finish` leaves the gradient of the global batch in ``.grad``. False when
            the optimizer owns the exchange and ``.grad`` stays local, scaled so that its *mean* over replicas is the
            gradient of the global batch.
    """

    averages_gradients: bool

    def begin_step(self, weight: Callable[[], float]) -> None:
        """Forget the last step; ``weight()`` is asked for when the first bucket starts."""

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        """The next gradient accumulated into each of these parameters is its last in this step."""

    def ready(self, parameters: Iterable[nn.Parameter]) -> None:
        """The gradients of these parameters are final now."""

    def finish(self) -> None:
        """Start what has not started (an unused parameter counts as zeros), wait for all, fill in ``.grad``."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep: error memories (tensors, by name) and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore, copying into existing storage (alignment is part of bitwise equality)."""


@runtime_checkable
class Undoable(Protocol):
    """An exchange whose last step can be taken back."""

    def undo(self) -> None:
        """The step that ``finish()`` ended counts as not made, because its gradients are thrown away."""


@runtime_checkable
class TakesDebts(Protocol):
    """An exchange that can go on with what another number of replicas owed."""

    def load_debts(self, states: Sequence[dict[str, Any]]) -> bool:
        """Take over :meth:`GradientExchange.state_dict` of each old replica; whether the memories belong here."""


@runtime_checkable
class OwnsExchange(Protocol):
    """An optimizer that communicates over the replicas itself, inside ``step()`` (the 1-bit family)."""

    owns_exchange: bool

    def bind_exchange(self, *, group: Any, replicas: int, meter: Any, watcher: Any) -> None:
        """Say who the replicas are, and where bytes are counted and waits watched; before the first step.

        Args:
            group: The process group of the replicas; None for a single one.
            replicas: How many there are.
            meter: A :class:`penstock._core.meter.Meter`.
            watcher: A :class:`penstock._core.waiting.Watcher`.
        """

    def error_state(self) -> dict[str, Any]:
        """What belongs to this rank alone: error memories (tensors) and plain values, by name."""

    def load_error_state(self, state: dict[str, Any]) -> Any:
        """Restore what :meth:`error_state` returned on the same layout, copying into existing storage."""

    def load_error_states(self, states: Sequence[dict[str, Any]]) -> Any:
        """Take over what another number of replicas owed: :meth:`error_state` of each, in the order of the ranks."""


@runtime_checkable
class HasCommonWeights(Protocol):
    """Something under which the replicas' parameters differ between exchanges."""

    def common_weights(self) -> AbstractContextManager[None]:
        """Within it the parameters are those on which all replicas agree."""


@runtime_checkable
class Synchronizes(Protocol):
    """Something that exchanges only now and then what the replicas have learnt."""

    def synchronize(self) -> None:
        """Exchange now, whatever the step; collective."""


@runtime_checkable
class BatchEngine(Protocol):
    """Anything that a loop can drive: Penstock's engine, or a user's own."""

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Any:
        """One optimizer step; returns the mean loss, the same on every rank."""

    def eval_batch(self, data_iter: Iterator[Any]) -> Any:
        """Mean loss of one global batch, in eval mode, without gradients."""

    def predict_batch(self, data_iter: Iterator[Any]) -> Any:
        """Outputs of one global batch, in eval mode, without gradients."""
