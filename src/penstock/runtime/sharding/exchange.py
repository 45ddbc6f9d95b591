"""The exchange of gradients by FSDP2: summed and divided over the replicas once per stage and step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from penstock._core.protocols import GradientExchange, TakesDebts, Undoable
from penstock._core.sharded import here, is_sharded
from penstock.compression.sharded import CompressedReduceScatter
from penstock.pipe.stage import Stage

_PREFIX: Final = "sharded."


class ShardedGradients:
    """A :class:`~penstock._core.protocols.GradientExchange` over stages that :func:`shard_stage` divided.

    Micro-batches add up their gradients on each replica; the last backward pass of a stage reduces and divides them,
    layer by layer. Where backward passes are split, weight gradients are there only after the last of the second
    halves, and all layers reduce then. What stays whole on every replica (tied weights) goes through another exchange.

    Args:
        stages: The stages of this rank.
        whole: Exchanges the gradients of parameters that are not divided; its weights are this one's.
        compressed: What reduces the layers' gradients in these stages, by name, if they are compressed. They are then
            weighted beforehand, so that error memories are in units of the final gradient.
    """

    averages_gradients = True

    def __init__(
        self,
        stages: Sequence[Stage],
        whole: GradientExchange,
        *,
        compressed: Mapping[str, CompressedReduceScatter] | None = None,
    ) -> None:
        self._roots = [stage for stage in stages if isinstance(stage, FSDPModule)]
        assert len(self._roots) == len(stages)
        self._whole = whole
        self._compressed = dict(compressed or {})
        self._step = 0
        self._sharded = [p for stage in stages for p in stage.parameters() if is_sharded(p, "data")]
        self._root_of = {
            id(parameter): root
            for stage, root in zip(stages, self._roots, strict=True)
            for parameter in stage.parameters()
            if is_sharded(parameter, "data")
        }
        self._weight: Callable[[], float] = lambda: 1.0

    def begin_step(self, weight: Callable[[], float]) -> None:
        """Let gradients add up locally until :meth:`arm`."""
        self._weight = weight
        self._whole.begin_step(weight)
        for scatter in self._compressed.values():
            scatter.settle()
        for root in self._roots:
            _reduce_in_backward(root, False)

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        """The stages of these parameters reduce in their next backward pass."""
        given = list(parameters)
        for root in self._about_to_reduce(given):
            _reduce_in_backward(root, True)
        self._whole.arm([parameter for parameter in given if id(parameter) not in self._root_of])

    def ready(self, parameters: Iterable[nn.Parameter]) -> None:
        """Parameters that are not divided are final; the stages of those that are reduce at once."""
        given = list(parameters)
        for root in self._about_to_reduce(given):
            _reduce_in_backward(root, True)
            # FSDP2 would be told by autograd; it has no public call for a gradient that came by another way.
            fully_shard.state(root)._root_post_backward_final_callback()  # type: ignore[attr-defined]
        self._whole.ready([parameter for parameter in given if id(parameter) not in self._root_of])

    def finish(self) -> None:
        """Scale the reduced gradients; a parameter that no replica used keeps none."""
        self._whole.finish()
        if self._compressed:
            self._step += 1
            return
        gradients = [here(parameter.grad) for parameter in self._sharded if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self._weight())

    def reshard(self) -> None:
        """Free gathered parameters, as after a forward pass that no backward pass follows."""
        for root in self._roots:
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def undo(self) -> None:
        """The step that :meth:`finish` ended counts as not made; all replicas must agree on it."""
        if isinstance(self._whole, Undoable):
            self._whole.undo()
        for scatter in self._compressed.values():
            scatter.undo()
        if self._compressed:
            self._step -= 1

    def state_dict(self) -> dict[str, Any]:
        """What the exchange of whole parameters keeps and, with compression, the step and the layers' memories."""
        state = self._whole.state_dict()
        if not self._compressed:
            return state
        state["step"] = self._step
        for name, scatter in self._compressed.items():
            state.update({f"{_PREFIX}{name}.{key}": value for key, value in scatter.state_dict().items()})
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ``{"step": N}`` alone starts from empty memories.

        Raises:
            ValueError: The state has memories of other layers.
        """
        whole, by_layer = self._parted(state)
        self._step = int(state.get("step", 0))  # a run that did not compress had no need to count
        for name, scatter in self._compressed.items():
            scatter.load_state_dict({"step": self._step, **by_layer[name]})
        self._whole.load_state_dict(whole)

    def load_debts(self, states: Sequence[dict[str, Any]]) -> bool:
        """Take over what another number of replicas owed: the sum of all memories stays what it was.

        Args:
            states: What :meth:`state_dict` gave on each of the old replicas, in rank order.

        Returns:
            Whether all memories belong to these layers; those that do not start empty.

        Raises:
            ValueError: The states have memories of other layers.
        """
        self._step = int(states[0].get("step", 0))
        parted = [self._parted(state) for state in states]
        whole = [of_whole for of_whole, _ in parted]
        fits = True
        if isinstance(self._whole, TakesDebts):
            fits = self._whole.load_debts(whole)
        for name, scatter in self._compressed.items():
            fits &= scatter.load_debts([{**by_layer[name], "step": self._step} for _, by_layer in parted])
        return fits

    def _parted(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """What of a state belongs to the exchange of whole parameters, and what to each layer.

        Raises:
            ValueError: The state has memories of other layers.
        """
        whole = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}
        by_layer: dict[str, dict[str, Any]] = {name: {} for name in self._compressed}
        for name in state.keys() - whole.keys():
            layer, _, key = name.removeprefix(_PREFIX).rpartition(".")
            by_layer.setdefault(layer, {})[key] = state[name]
        strangers = sorted(by_layer.keys() - self._compressed.keys())
        if strangers:
            raise ValueError(
                f"the saved error memories are of {len(strangers)} layers ({', '.join(strangers[:3])}, ...), whose "
                "gradients go uncompressed here; resume with the compression that the checkpoint was written with"
            )
        if "step" not in self._whole.state_dict():
            whole.pop("step", None)
        return whole, by_layer

    def _about_to_reduce(self, parameters: Iterable[nn.Parameter]) -> list[FSDPModule]:
        """The stages that hold some divided parameters, each once; what compresses is told of the step."""
        for scatter in self._compressed.values():
            scatter.step, scatter.scale = self._step, self._weight()
        found = (self._root_of.get(id(parameter)) for parameter in parameters)
        return list({id(root): root for root in found if root is not None}.values())


def _reduce_in_backward(root: Any, last: bool) -> None:
    root.set_is_last_backward(last)
    root.set_requires_gradient_sync(last)
    root.set_reshard_after_backward(last)
