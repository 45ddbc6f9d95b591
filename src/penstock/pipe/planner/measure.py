"""Runs the layers of a stage one by one, as the engine would, and measures what each takes.

Layers are timed one by one and the stage is timed as a whole, in turn. The layers' times are then scaled to add up to
the stage's: starting autograd for every layer costs more than for all of them together.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from penstock._core.batch_key import BatchKey
from penstock.pipe.loss import LossFn, loss_of
from penstock.pipe.modes import random_state_kept
from penstock.pipe.planner.profile import LayerCosts
from penstock.pipe.split_backward import SplitBackward
from penstock.pipe.stage import Cut, Stage
from penstock.pipe.value import flatten, unflatten

_OPS: Final = ("F", "B", "I", "W")


@dataclass(frozen=True)
class Flow:
    """What passes from layer to layer.

    Attributes:
        value: Any nest of tensors and plain values.
        wants: For each tensor in it, whether it requires a gradient.
    """

    value: Any
    wants: tuple[bool, ...]

    @classmethod
    def inputs(cls, value: Any) -> "Flow":
        """A batch's inputs, of which nobody needs the gradient."""
        return cls(value, (False,) * len(flatten(value, what="the inputs")[1]))


@dataclass
class _Pass:
    """A forward pass that has not run backward yet."""

    leaves: list[Tensor]
    outputs: list[Tensor]
    cut: Cut | None
    flow: Flow


@dataclass
class _Timed:
    """A stage, or one layer as a stage of its own, and the times of its passes."""

    stage: Stage
    targets: Any
    loss_fn: LossFn | None
    split: SplitBackward = field(default_factory=SplitBackward)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {op: [] for op in _OPS})
    gradients: list[Tensor] | None = None

    def forward(self, flow: Flow, key: BatchKey, *, split: bool) -> _Pass:
        value, leaves = _fresh(flow)
        cuts: list[Cut] | None = [] if split and not leaves else None
        self._wait()
        start = time.perf_counter()
        output = self.stage(value, key, cuts)
        if self.stage.is_last:
            with self.stage.autocast():
                outputs = [loss_of(output, self.targets, self.loss_fn, stage=self.stage.index)]
            found = outputs
        else:
            _, found = flatten(output, what=f"the output of layer {self.stage.stop - 1}")
            outputs = [tensor for tensor in found if tensor.requires_grad]
        self._wait()
        self.seconds["F"].append(time.perf_counter() - start)
        if self.gradients is None:
            # Of the size of gradients, not of zeros or of numbers so small that processors are slow with them.
            self.gradients = [torch.full_like(tensor, 1.0 if self.stage.is_last else 1e-3) for tensor in outputs]
        return _Pass(leaves, outputs, cuts[0] if cuts else None, Flow(output, tuple(t.requires_grad for t in found)))

    def backward(self, passed: _Pass, *, split: bool) -> None:
        assert self.gradients is not None
        self._wait()
        start = time.perf_counter()
        if not split:
            if passed.outputs:
                torch.autograd.backward(passed.outputs, self.gradients)
            self._wait()
            self.seconds["B"].append(time.perf_counter() - start)
            return
        _, work = self.split.input_half(passed.outputs, self.gradients, passed.leaves, passed.cut)
        self._wait()
        middle = time.perf_counter()
        work.run()
        self._wait()
        self.seconds["I"].append(middle - start)
        self.seconds["W"].append(time.perf_counter() - middle)

    def median(self, op: str) -> float:
        return statistics.median(self.seconds[op])

    def _wait(self) -> None:
        if self.stage.device.type == "cuda":
            torch.cuda.synchronize(self.stage.device)


def run_through(stage: Stage, flow: Flow, key: BatchKey) -> Flow:
    """What a stage, but the last, makes of a value; torch's random states stay as they are."""
    with random_state_kept(stage.device):
        return _Timed(stage, None, None).forward(flow, key, split=False).flow


def measure_layers(
    stage: Stage,
    flow: Flow,
    *,
    names: Sequence[str],
    targets: Any = None,
    loss_fn: LossFn | None = None,
    key: BatchKey,
    more: Callable[[int], bool],
    split: bool = True,
) -> list[LayerCosts]:
    """Measure the layers of a stage for one micro-batch.

    Gradients add up in ``.grad``, as over the micro-batches of a step. Torch's random states stay as they are.

    Args:
        stage: In train mode, without activation checkpointing.
        flow: Its input.
        names: The name of each of its layers.
        targets: For the loss, on the last stage.
        loss_fn: On the last stage; None where the last layer returns the loss.
        key: Names the micro-batch.
        more: Called with the number of rounds that were timed; whether to go on. A round runs every layer, and the
            stage as a whole, forward and backward, and again with the backward pass in halves.
        split: Whether to time halves; else the first half counts as the whole, and the second as nothing.

    Returns:
        Costs of each layer; parameters, optimizer state and ties are left at zero.
    """
    whole = _Timed(stage, targets, loss_fn)
    parts = [_Timed(layer, targets, loss_fn) for layer in _one_by_one(stage)]
    with random_state_kept(stage.device):
        sizes = _sizes(parts, flow, key)
        for rounds in _rounds(more):
            for halves in (False, True) if split else (False,):
                _chain(parts, flow, key, split=halves)
                passed = whole.forward(flow, key, split=halves)
                whole.backward(passed, split=halves)
            if rounds == 0:  # memory was fresh and kernels were chosen
                for timed in (whole, *parts):
                    timed.seconds = {op: [] for op in _OPS}
    if not split:
        for timed in (whole, *parts):
            timed.seconds |= {"I": timed.seconds["B"], "W": [0.0]}
    scale = {op: _ratio(whole.median(op), sum(part.median(op) for part in parts)) for op in _OPS}
    return [
        replace(
            size,
            name=name,
            forward=scale["F"] * part.median("F"),
            backward=scale["B"] * part.median("B"),
            input_gradient=scale["I"] * part.median("I"),
            weight_gradient=scale["W"] * part.median("W"),
            whole=tuple(part.split.reasons),
        )
        for name, part, size in zip(names, parts, sizes, strict=True)
    ]


def _rounds(more: Callable[[int], bool]) -> Iterator[int]:
    """0 for the round that warms up, then one number for each that is timed, until no more are wanted."""
    rounds = 0
    while rounds == 0 or more(rounds - 1):
        yield rounds
        rounds += 1


def _one_by_one(stage: Stage) -> list[Stage]:
    layers = []
    for index in range(stage.start, stage.stop):
        last = stage.is_last and index == stage.stop - 1
        first = stage.is_first and index == stage.start
        layer = Stage(
            index=0 if first else 2 if last else 1,
            num_stages=1 if first and last else 3,
            start=index,
            modules=[stage.layers[str(index)]],
            device=stage.device,
        )
        layer.autocast_dtype = stage.autocast_dtype
        layers.append(layer)
    return layers


def _chain(parts: list[_Timed], flow: Flow, key: BatchKey, *, split: bool) -> None:
    passes = []
    for part in parts:
        passes.append(part.forward(flow, key, split=split))
        flow = passes[-1].flow
    for part in reversed(parts):
        part.backward(passes.pop(), split=split)


def _sizes(parts: list[_Timed], flow: Flow, key: BatchKey) -> list[LayerCosts]:
    """What each layer keeps, found by running all of them forward once."""
    sizes = []
    passes = []  # kept: a storage that was freed would lend its address to the next
    before: dict[int, int] = {}
    for part in parts:
        own = _storages([*part.stage.parameters(), *part.stage.buffers()])
        kept: dict[int, int] = {}

        def save(tensor: Tensor, own: dict[int, int] = own, kept: dict[int, int] = kept) -> Tensor:
            kept.update({at: size for at, size in _storages([tensor]).items() if at not in own})
            return tensor

        loss_kept = _kept_by_loss(part, flow, key, own)
        came_in = _storages(flatten(flow.value)[1])
        with saved_tensors_hooks(save, lambda tensor: tensor):
            passes.append(part.forward(flow, key, split=False))
        flow = passes[-1].flow
        went_out = _storages([] if part.stage.is_last else flatten(flow.value)[1])
        sizes.append(
            LayerCosts(
                name="",
                forward=0.0,
                backward=0.0,
                input_gradient=0.0,
                weight_gradient=0.0,
                kept=sum(kept.values()),
                shared=sum(size for at, size in kept.items() if at in before),
                input_beyond=sum(size for at, size in came_in.items() if at not in kept),
                output_beyond=sum(size for at, size in went_out.items() if at not in kept and at not in came_in),
                output=sum(tensor.nbytes for tensor in ([] if part.stage.is_last else flatten(flow.value)[1])),
                loss_kept=loss_kept,
            )
        )
        before = kept
    for part in reversed(parts):
        part.backward(passes.pop(), split=False)
    return sizes


def _kept_by_loss(part: _Timed, flow: Flow, key: BatchKey, own: Collection[int]) -> int:
    """Bytes that the loss function keeps."""
    if not part.stage.is_last or part.loss_fn is None:
        return 0
    output = part.stage(_fresh(flow)[0], key)
    kept: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        kept.update(_storages([tensor]))
        return tensor

    with part.stage.autocast(), saved_tensors_hooks(save, lambda tensor: tensor):
        loss_of(output, part.targets, part.loss_fn, stage=part.stage.index)
    return sum(size for at, size in kept.items() if at not in own)


def _fresh(flow: Flow) -> tuple[Any, list[Tensor]]:
    """The value as leaves of a new graph, and those of them that require a gradient."""
    structure, tensors = flatten(flow.value)
    fresh = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(tensors, flow.wants, strict=True)]
    return unflatten(structure, fresh), [tensor for tensor in fresh if tensor.requires_grad]


def _storages(tensors: Sequence[Tensor | nn.Parameter]) -> dict[int, int]:
    """The bytes of each storage, by its address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _ratio(whole: float, parts: float) -> float:
    return whole / parts if parts > 0 else 1.0
