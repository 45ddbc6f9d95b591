"""The flat buffers of one bucket of parameters under an optimizer that communicates by itself."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.buckets import Bucket
from penstock.compression.chunks import Part
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.group import ranks_of
from penstock.compression.masks import flat_mask
from penstock.compression.reduction import LocalReduction, Reduction, make_reduction

MASTER: Final = "master"
"""Name in the state of the float32 copy of half-precision parameters."""

_FLOOR_BLOCK: Final = 1024
"""Elements over which a frozen deviation is compared with its neighbours'."""


class AloneReduction:
    """What one replica would receive of itself.

    Args:
        tensor: Flat; replaced by what is sent of it and the memory.
        algorithm: Compresses part by part.
        memory: What is not sent is kept in its ``worker``.
        parts: The tensors to compress one by one.
    """

    def __init__(
        self, tensor: Tensor, algorithm: CompressionAlgorithm, memory: ErrorMemory, parts: Sequence[Part]
    ) -> None:
        self._tensor = tensor
        self._algorithm = algorithm
        self._memory = memory
        self._parts = parts

    def start(self, step: int | None = None) -> None:
        """Compress and decompress."""
        for index, part in enumerate(self._parts):
            algorithm = self._algorithm.keyed(step or 0, index)
            payload = algorithm.compress_with_memory(part.of(self._tensor), part.of(self._memory.worker))
            algorithm.decompress(payload, part.of(self._tensor))

    def advance(self) -> bool:
        """There is no collective."""
        return False

    def wait(self) -> None:
        """Nothing to wait for."""


class FlatBucket:
    """The states and the exchange buffer of a bucket's parameters, with its error memories.

    Every element-wise operation runs once over a whole buffer; only what touches gradients and parameters goes tensor
    by tensor.

    Args:
        layout: Which parameters, and where they lie.
        algorithm: Compressor of what is exchanged.
        group: The replicas.
        states: Names of the element-wise states, a buffer of zeros each.
        masters: Keep a copy of the parameters, under :data:`MASTER`, even if they are not half-precision.
        compress_alone: Compress with a memory on one replica, too.
        masks: By parameter name, where a gradient may ever be.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Attributes:
        states: The buffers by name, ``[layout.numel]`` each.
        exchanged: The buffer that reductions work on.
        weights: What updates are made to: each parameter, or its view into the masters.
        memory: The error memories; None on one replica and for lossless algorithms.
        replicas: How many there are.
        gradient_scale: What gradients are divided by as they are read, ``[]``; None to take them as they are.
    """

    def __init__(
        self,
        layout: Bucket,
        algorithm: CompressionAlgorithm,
        group: dist.ProcessGroup | None,
        *,
        states: Sequence[str],
        masters: bool = False,
        compress_alone: bool = False,
        masks: Mapping[str, Tensor] | None = None,
        meter: Meter | None,
        watcher: Watcher | None,
    ) -> None:
        self.layout = layout
        self.states = {name: layout.new_flat() for name in states}
        self.exchanged = layout.new_flat()
        self.exchanged_views = layout.views(self.exchanged)
        self.gradient_scale: Tensor | None = None
        self.weights: list[Tensor] = list(layout.parameters)
        if masters or any(parameter.dtype != layout.dtype for parameter in layout.parameters):
            self.states[MASTER] = layout.new_flat()
            self.weights = layout.views(self.states[MASTER])
            for master, parameter in zip(self.weights, layout.parameters, strict=True):
                master.copy_(parameter.detach())
        self.views = {name: layout.views(flat) for name, flat in self.states.items()}
        self._gaps = layout.gaps(self.exchanged)
        self._algorithm = algorithm
        self._compress_alone = compress_alone
        self._mask: Tensor | None = None
        if masks and not algorithm.lossless:
            ones = layout.new_flat()
            self._mask = flat_mask(ones, layout.names, layout.views(ones), masks)
        self.bind(group, alone=ranks_of(group) == 1, meter=meter, watcher=watcher)

    def bind(
        self, group: dist.ProcessGroup | None, *, alone: bool, meter: Meter | None, watcher: Watcher | None
    ) -> None:
        """Say who the replicas are; error memories start empty.

        Args:
            group: The replicas.
            alone: There is but this one, whatever the group.
            meter: Counts bytes and waiting seconds.
            watcher: Bounds the waits.
        """
        self.memory: ErrorMemory | None = None
        self.replicas = 1 if alone else ranks_of(group)
        self._plain: Reduction = LocalReduction()
        self._compressed: Reduction = LocalReduction()
        if alone and not self._compress_alone:
            return
        parts = self.layout.parts
        if not self._algorithm.lossless:
            self.memory = ErrorMemory.for_tensor(self.exchanged, group, algorithm=self._algorithm, parts=parts)
        if alone:
            assert self.memory is not None  # what compresses alone is lossy
            self._compressed = AloneReduction(self.exchanged, self._algorithm, self.memory, parts)
            return
        factor = 1.0 / ranks_of(group)
        self._plain = make_reduction(self.exchanged, None, group, factor=factor, meter=meter, watcher=watcher)
        self._compressed = make_reduction(
            self.exchanged,
            self._algorithm,
            group,
            memory=self.memory,
            parts=parts,
            factor=factor,
            key=self.layout.key,
            meter=meter,
            watcher=watcher,
        )

    def state_views(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Each parameter's states, as views."""
        return {
            parameter: {name: views[index] for name, views in self.views.items()}
            for index, parameter in enumerate(self.layout.parameters)
        }

    def reduction(self, *, compressed: bool) -> Reduction:
        """The average over the replicas of the exchange buffer."""
        return self._compressed if compressed else self._plain

    def fill(self) -> None:
        """Gradients into the exchange buffer, zeros where there is none.

        Raises:
            ValueError: A gradient is sparse.
        """
        for gap in self._gaps:
            gap.zero_()
        self.copy_gradients(self.exchanged_views)

    def copy_gradients(self, into: Sequence[Tensor]) -> None:
        """Gradients into one view for each parameter, zeros where there is none; a sparse one is refused."""
        for name, parameter, view in zip(self.layout.names, self.layout.parameters, into, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.is_sparse:
                raise ValueError(f"{name} has a sparse gradient; make its embedding with sparse=False")
            else:
                view.copy_(parameter.grad)
                if self.gradient_scale is not None:
                    view.div_(self.gradient_scale.to(view.device))

    def cut_off(self) -> None:
        """What compression made where no gradient ever is goes, from the exchange buffer and the memories."""
        if self._mask is None:
            return
        self.exchanged.mul_(self._mask)
        if self.memory is not None:
            self.memory.cut_off(self._mask)

    def exchanged_is_finite(self) -> bool:
        """Whether the buffer holds neither NaN nor infinity."""
        return bool(torch.isfinite(self.exchanged.sum())) or bool(torch.isfinite(self.exchanged).all())

    def clear_gaps(self) -> None:
        """What decompression left between parameters goes."""
        for gap in self._gaps:
            gap.zero_()

    def adopt_parameters(self) -> None:
        """Take over what was written to the parameters since :meth:`publish`: a checkpoint's weights, for example."""
        if MASTER not in self.states:
            return
        for master, parameter in zip(self.weights, self.layout.parameters, strict=True):
            current = parameter.detach()
            torch.where(master.to(current.dtype) == current, master, current.to(master.dtype), out=master)

    def publish(self) -> None:
        """Round the masters, where there are any, into the parameters."""
        if MASTER not in self.states:
            return
        for master, parameter in zip(self.weights, self.layout.parameters, strict=True):
            if parameter.requires_grad:
                parameter.copy_(master)

    def trainable(self, *of_each: Sequence[Tensor]) -> list[list[Tensor]]:
        """Lists with one entry a parameter, cut down to the parameters that require a gradient."""
        wanted = [parameter.requires_grad for parameter in self.layout.parameters]
        return [[entry for entry, take in zip(entries, wanted, strict=True) if take] for entries in of_each]


def accept_gradient(bucket: FlatBucket, beta1: float, beta2: float) -> None:
    """Adam's moments ``exp_avg`` and ``exp_avg_sq`` from the averaged gradient."""
    bucket.states["exp_avg"].lerp_(bucket.exchanged, 1 - beta1)
    bucket.states["exp_avg_sq"].mul_(beta2).addcmul_(bucket.exchanged, bucket.exchanged, value=1 - beta2)


class Denominator:
    """What Adam divides its momentum by: ``sqrt(variance) / correction + eps``, in a buffer of its own.

    Args:
        layout: Whose variance it is.
        variance: The flat variance, ``[layout.numel]``.
    """

    def __init__(self, layout: Bucket, variance: Tensor) -> None:
        self.flat = layout.new_flat()
        self.views = layout.views(self.flat)
        self._variance = variance
        self._kept: tuple[int, float, float, float] | None = None

    def follow(self, correction: float, eps: float) -> None:
        """Adam's own, of the variance as it is now."""
        self._kept = None
        torch.sqrt(self._variance, out=self.flat)
        self.flat.div_(correction).add_(eps)

    def freeze(self, correction: float, eps: float, floor: float) -> None:
        """The same with a floor under the deviation; infinite where there is no variance at all.

        A frozen variance needs care where it is tiny beside its neighbours', as in embedding rows hardly seen so far:
        there the neighbours' scale, divided by the row's own deviation, would be a huge step. So the deviation is
        raised to ``floor`` times its mean over the 1,024 consecutive elements around it, which keeps the update linear
        in the momentum, so that errors still cancel.

        The result is kept until the variance is written to (a checkpoint was loaded) or an argument changes.
        """
        wanted = (self._variance._version, correction, eps, floor)
        if self._kept == wanted:
            return
        torch.sqrt(self._variance, out=self.flat)
        whole = self.flat.numel() // _FLOOR_BLOCK * _FLOOR_BLOCK
        for blocks in (self.flat[:whole].view(-1, _FLOOR_BLOCK), self.flat[whole:].view(1, -1)):
            if blocks.numel():
                blocks.clamp_(min=floor * blocks.mean(dim=1, keepdim=True))
        nothing = self.flat == 0
        self.flat.div_(correction).add_(eps).masked_fill_(nothing, torch.inf)
        self._kept = wanted
