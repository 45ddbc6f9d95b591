"""A backward pass in two halves: input gradients now, weight gradients whenever there is time.

The neighbouring stage waits for the input gradients only, so a schedule may fill idle time with the weight gradients
of earlier micro-batches (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024). The halves of a product are
computed once each, by the same kernels as in a whole backward pass, for any module: :mod:`gradient_graph
<penstock.pipe.gradient_graph>` says how a graph is divided, and which weights cannot wait.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from penstock.pipe.gradient_graph import Division, divide
from penstock.pipe.recompute import is_recomputing
from penstock.pipe.stage import Cut
from penstock.pipe.value import flatten, map_tensors
from penstock.pipe.weight_work import WeightWork, with_gradients

_INNER_CHECKPOINT = "layers recompute activations themselves, and would again for every part of a split pass"


class SplitBackward:
    """Splits the backward passes of one stage.

    Attributes:
        reasons: Why some weight gradients of this stage are computed with the input gradients, as far as seen.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, None] = {}
        self._whole = False
        self._looked = False

    def divide(self, outputs: list[Tensor], leaves: list[Tensor], cut: Cut | None) -> Division | None:
        """What :meth:`input_half` finds out first, for a time when nobody waits; None where there is nothing to it."""
        ends = leaves if cut is None else cut.leaves
        return divide(outputs, ends) if outputs and ends and not self._whole else None

    def input_half(
        self,
        outputs: list[Tensor],
        gradients: list[Tensor],
        leaves: list[Tensor],
        cut: Cut | None,
        division: Division | None = None,
    ) -> tuple[list[Tensor | None], WeightWork]:
        """Run the first half of a backward pass.

        Args:
            outputs: Tensors with a graph.
            gradients: Of the outputs.
            leaves: The stage's inputs that require a gradient.
            cut: Where the graph ends before it reaches the stage's input; then there are no leaves.
            division: From :meth:`divide`, of these outputs and perhaps more; None finds it now.

        Returns:
            The gradients of the leaves, None where nothing depends on one, and the second half. Parameters whose
            gradient cannot wait have it added to theirs.
        """
        work = WeightWork()
        if not outputs:
            return [None] * len(leaves), work
        if self._whole:
            self._run_whole(outputs, gradients, cut)
            return [leaf.grad for leaf in leaves], work
        ends = leaves if cut is None else cut.leaves
        if not ends:
            work.add_pass(outputs, gradients)
            return [], work
        division = division or divide(outputs, ends)
        if self._looked:
            found = self._to_inputs(outputs, gradients, ends, division, work)
        else:
            with _forward_calls() as called:
                found = self._to_inputs(outputs, gradients, ends, division, work)
            self._looked = True
            if called:
                self._whole = True
                self.reasons[_INNER_CHECKPOINT] = None
        if cut is None:
            return found, work
        cut_outputs, arrived = with_gradients(cut.outputs, found)
        if cut_outputs:
            work.add_pass(cut_outputs, arrived)
        return [], work

    def _to_inputs(
        self,
        outputs: list[Tensor],
        gradients: list[Tensor],
        ends: list[Tensor],
        division: Division,
        work: WeightWork,
    ) -> list[Tensor | None]:
        self.reasons.update(dict.fromkeys(division.reasons))
        arrivals = [edge for owner in (*division.direct, *division.joint) for edge in owner.arrivals]
        wanted: list[Any] = [*ends, *division.whole, *arrivals]
        found = torch.autograd.grad(outputs, wanted, gradients, retain_graph=bool(arrivals), allow_unused=True)
        first, second = len(ends), len(ends) + len(division.whole)
        leaves, arrived = with_gradients(division.whole, found[first:second])
        if leaves:
            torch.autograd.backward(leaves, arrived)
        work.add_owners(division, found[second:])
        return list(found[:first])

    def _run_whole(self, outputs: list[Tensor], gradients: list[Tensor], cut: Cut | None) -> None:
        torch.autograd.backward(outputs, gradients)
        if cut is not None:
            before, arrived = with_gradients(cut.outputs, [leaf.grad for leaf in cut.leaves])
            if before:
                torch.autograd.backward(before, arrived)


def reasons_against_splitting(layer: Callable[[Any], Any], value: Any) -> tuple[str, ...]:
    """Why weight gradients of a layer cannot wait, found by running it forward and backward once.

    Args:
        layer: Its parameters' ``.grad`` are put back as they were.
        value: A sample input; floating-point tensors in it are taken to require a gradient.

    Returns:
        Sentences; none where the whole weight half can wait.
    """
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        _, tensors = flatten(layer(map_tensors(leaf, value)), what="the output of the layer")
    outputs = [tensor for tensor in tensors if tensor.requires_grad]
    split = SplitBackward()
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []
    kept = [parameter.grad for parameter in parameters]
    split.input_half(outputs, [torch.zeros_like(output) for output in outputs], leaves, None)
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient
    return tuple(split.reasons)


@contextmanager
def _forward_calls() -> Iterator[list[nn.Module]]:
    """Collects the modules that are called, but for the stage's own recomputation."""
    called: list[nn.Module] = []

    def note(module: nn.Module, _: object) -> None:
        if not is_recomputing():
            called.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()
