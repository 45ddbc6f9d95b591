"""The exchange for an optimizer that communicates by itself, and for a single replica: gradients stay local."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from penstock._core.sharded import here


class LocalGradients:
    """A :class:`~penstock._core.protocols.GradientExchange` that sends nothing.

    :meth:`finish` scales each local gradient by ``weight * replicas``, so that the *mean* over the replicas is the
    gradient of the global batch, which is what the 1-bit optimizers average.

    Args:
        parameters: All parameters whose gradients are to be scaled.
        replicas: How many data-parallel replicas there are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, replicas: int) -> None:
        if replicas < 1:
            raise ValueError(f"there is at least one replica, got replicas={replicas}")
        self._parameters = list(parameters)
        self._replicas = replicas
        self._weight: Callable[[], float] = lambda: 1.0
        self.averages_gradients = replicas == 1

    def begin_step(self, weight: Callable[[], float]) -> None:
        """Remember how to ask for the loss weight."""
        self._weight = weight

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing starts early."""

    def ready(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing starts early."""

    def finish(self) -> None:
        """Scale the gradients in place; a parameter without a gradient keeps none."""
        factor = self._weight() * self._replicas
        gradients = [here(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)

    def state_dict(self) -> dict[str, Any]:
        """There is nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept only the empty state.

        Raises:
            ValueError: The state holds error memories, so the run that wrote it exchanged gradients another way.
        """
        if state:
            raise ValueError(
                f"the saved exchange keeps {sorted(state)[:3]}..., but gradients stay local in this run; "
                "resume with the exchange that the checkpoint was written with"
            )
