"""The exchange of gradients by FSDP2: summed and divided over the replicas once per stage and step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from penstock._core.protocols import GradientExchange
from penstock._core.sharded import here, is_sharded
from penstock.pipe.stage import Stage


class ShardedGradients:
    """A :class:`~penstock._core.protocols.GradientExchange` over stages that :func:`shard_stage` divided.

    Micro-batches add up their gradients on each replica; the last backward pass of a stage reduces and divides them,
    layer by layer. Where backward passes are split, weight gradients are there only after the last of the second
    halves, and all layers reduce then. What stays whole on every replica (tied weights) goes through another exchange.

    Args:
        stages: The stages of this rank.
        whole: Exchanges the gradients of parameters that are not divided; its weights are this one's.
    """

    averages_gradients = True

    def __init__(self, stages: Sequence[Stage], whole: GradientExchange) -> None:
        self._roots = [stage for stage in stages if isinstance(stage, FSDPModule)]
        assert len(self._roots) == len(stages)
        self._whole = whole
        self._sharded = [p for stage in stages for p in stage.parameters() if is_sharded(p)]
        self._root_of = {
            id(parameter): root
            for stage, root in zip(stages, self._roots, strict=True)
            for parameter in stage.parameters()
            if is_sharded(parameter)
        }
        self._weight: Callable[[], float] = lambda: 1.0

    def begin_step(self, weight: Callable[[], float]) -> None:
        """Let gradients add up locally until :meth:`arm`."""
        self._weight = weight
        self._whole.begin_step(weight)
        for root in self._roots:
            _reduce_in_backward(root, False)

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        """The stages of these parameters reduce in their next backward pass."""
        given = list(parameters)
        for root in self._roots_of(given):
            _reduce_in_backward(root, True)
        self._whole.arm([parameter for parameter in given if id(parameter) not in self._root_of])

    def ready(self, parameters: Iterable[nn.Parameter]) -> None:
        """Parameters that are not divided are final; the stages of those that are reduce at once."""
        given = list(parameters)
        for root in self._roots_of(given):
            _reduce_in_backward(root, True)
            # FSDP2 would be told by autograd; it has no public call for a gradient that came by another way.
            fully_shard.state(root)._root_post_backward_final_callback()  # type: ignore[attr-defined]
        self._whole.ready([parameter for parameter in given if id(parameter) not in self._root_of])

    def finish(self) -> None:
        """Scale the reduced gradients; a parameter that no replica used keeps none."""
        self._whole.finish()
        gradients = [here(parameter.grad) for parameter in self._sharded if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self._weight())

    def reshard(self) -> None:
        """Free gathered parameters, as after a forward pass that no backward pass follows."""
        for root in self._roots:
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _roots_of(self, parameters: Iterable[nn.Parameter]) -> list[FSDPModule]:
        """The stages that hold some divided parameters, each once."""
        found = (self._root_of.get(id(parameter)) for parameter in parameters)
        return list({id(root): root for root in found if root is not None}.values())

    def state_dict(self) -> dict[str, Any]:
        """What the exchange of whole parameters keeps."""
        return self._whole.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._whole.load_state_dict(state)


def _reduce_in_backward(root: Any, last: bool) -> None:
    root.set_is_last_backward(last)
    root.set_requires_gradient_sync(last)
    root.set_reshard_after_backward(last)
