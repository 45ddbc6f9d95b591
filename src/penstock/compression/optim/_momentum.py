"""The flat buffers of one bucket of parameters under a momentum-compressing optimizer."""

from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.buckets import Bucket
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.group import ranks_of
from penstock.compression.reduction import LocalReduction, Reduction, make_reduction

_FLOOR_BLOCK: Final = 1024
"""Elements over which a frozen deviation is compared with its neighbours'."""


class MomentumBucket:
    """Momentum, variance and the exchange buffer of a bucket's parameters, with its error memories.

    Every element-wise operation runs once over the whole buffer; only what touches gradients and parameters goes
    tensor by tensor.

    Args:
        layout: Which parameters, and where they lie.
        algorithm: Compressor of the momentum.
        group: The replicas.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.
    """

    def __init__(
        self,
        layout: Bucket,
        algorithm: CompressionAlgorithm,
        group: dist.ProcessGroup | None,
        *,
        meter: Meter | None,
        watcher: Watcher | None,
    ) -> None:
        self.layout = layout
        self._exp_avg = layout.new_flat()
        self._exp_avg_sq = layout.new_flat()
        self._exchanged = layout.new_flat()
        self._denominator = layout.new_flat()
        self._frozen_for: tuple[int, float, float, float] | None = None
        self._exchanged_views = layout.views(self._exchanged)
        self._momentum_views = layout.views(self._exp_avg)
        self._denominator_views = layout.views(self._denominator)
        self._gaps = layout.gaps(self._exchanged)
        self._algorithm = algorithm
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
        self._memory: ErrorMemory | None = None
        self._plain: Reduction = LocalReduction()
        self._compressed: Reduction = LocalReduction()
        if alone:
            return
        if not self._algorithm.lossless:
            self._memory = ErrorMemory.for_tensor(self._exchanged, group)
        factor = 1.0 / ranks_of(group)
        self._plain = make_reduction(self._exchanged, None, group, factor=factor, meter=meter, watcher=watcher)
        self._compressed = make_reduction(
            self._exchanged, self._algorithm, group, memory=self._memory, factor=factor, meter=meter, watcher=watcher
        )

    def state_views(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Each parameter's ``exp_avg`` and ``exp_avg_sq``, as views."""
        averages, squares = self._momentum_views, self.layout.views(self._exp_avg_sq)
        return {
            p: {"exp_avg": average, "exp_avg_sq": square}
            for p, average, square in zip(self.layout.parameters, averages, squares, strict=True)
        }

    def memory_tensors(self) -> dict[str, Tensor]:
        """The error memories; none on one replica."""
        return {} if self._memory is None else self._memory.tensors()

    def reduction(self, *, compressed: bool) -> Reduction:
        """The average over the replicas of the exchange buffer."""
        return self._compressed if compressed else self._plain

    def fill(self) -> None:
        """Gradients into the exchange buffer, zeros where there is none.

        Raises:
            ValueError: A gradient is sparse.
        """
        for name, parameter, view in zip(self.layout.names, self.layout.parameters, self._exchanged_views, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.is_sparse:
                raise ValueError(f"{name} has a sparse gradient; make its embedding with sparse=False")
            else:
                view.copy_(parameter.grad)

    def advance_momentum(self, *, beta1: float) -> None:
        """This replica's momentum into the exchange buffer, from the common momentum and its own gradient."""
        torch.lerp(self._exp_avg, self._exchanged, 1 - beta1, out=self._exchanged)

    def exchanged_is_finite(self) -> bool:
        """Whether the buffer holds neither NaN nor infinity."""
        return bool(torch.isfinite(self._exchanged.sum())) or bool(torch.isfinite(self._exchanged).all())

    def accept_gradient(self, beta1: float, beta2: float) -> None:
        """Adam's moments from the averaged gradient."""
        self._exp_avg.lerp_(self._exchanged, 1 - beta1)
        self._exp_avg_sq.mul_(beta2).addcmul_(self._exchanged, self._exchanged, value=1 - beta2)

    def accept_momentum(self) -> None:
        """The averaged momentum becomes the common one; what decompression left between parameters goes."""
        for gap in self._gaps:
            gap.zero_()
        self._exp_avg.copy_(self._exchanged)

    def denominator(self, correction: float, eps: float) -> list[Tensor]:
        """Adam's: the corrected root of the variance, plus ``eps``."""
        self._frozen_for = None
        torch.sqrt(self._exp_avg_sq, out=self._denominator)
        self._denominator.div_(correction).add_(eps)
        return self._denominator_views

    def frozen_denominator(self, correction: float, eps: float, floor: float) -> list[Tensor]:
        """The same from the frozen variance with its floor; infinite where there is no variance at all.

        It is kept until the variance is written to (a checkpoint was loaded) or an argument changes.
        """
        wanted = (self._exp_avg_sq._version, correction, eps, floor)
        if self._frozen_for == wanted:
            return self._denominator_views
        deviation = torch.sqrt(self._exp_avg_sq, out=self._denominator)
        whole = deviation.numel() // _FLOOR_BLOCK * _FLOOR_BLOCK
        for blocks in (deviation[:whole].view(-1, _FLOOR_BLOCK), deviation[whole:].view(1, -1)):
            if blocks.numel():
                blocks.clamp_(min=floor * blocks.mean(dim=1, keepdim=True))
        nothing = deviation == 0
        deviation.div_(correction).add_(eps).masked_fill_(nothing, torch.inf)
        self._frozen_for = wanted
        return self._denominator_views

    def update(self, denominators: list[Tensor], *, step_size: float, shrink: float) -> None:
        """Decay the parameters by the factor ``shrink`` and step along the momentum."""
        for parameter, momentum, denominator in zip(
            self.layout.parameters, self._momentum_views, denominators, strict=True
        ):
            if not parameter.requires_grad:
                continue
            if shrink != 1.0:
                parameter.mul_(shrink)
            parameter.addcdiv_(momentum, denominator, value=-step_size)
