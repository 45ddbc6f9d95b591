"""The plainest gradient exchange there is, for tests of the engine."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class PlainExchange:
    """Scales each gradient and sums it over the replicas, one parameter after the other, at the end.

    Records the calls it gets, so that tests can assert their order.
    """

    averages_gradients = True

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
        self.parameters = list(parameters)
        self.group = group
        self.calls: list[tuple[str, int]] = []
        self.final: list[int] = []
        self._weight: Callable[[], float] = lambda: 1.0

    def begin_step(self, weight: Callable[[], float]) -> None:
        self.calls.append(("begin_step", 0))
        self.final = []
        self._weight = weight

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        armed = [id(parameter) for parameter in parameters]
        self.calls.append(("arm", len(armed)))
        self.final += armed

    def ready(self, parameters: Iterable[nn.Parameter]) -> None:
        final = [id(parameter) for parameter in parameters]
        self.calls.append(("ready", len(final)))
        self.final += final

    def finish(self) -> None:
        self.calls.append(("finish", 0))
        assert len(self.final) == len(set(self.final)), "a parameter was declared final twice"
        assert set(self.final) == {id(p) for p in self.parameters if p.requires_grad}
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.mul_(self._weight())
            if self.group is not None:
                dist.all_reduce(parameter.grad, group=self.group)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
