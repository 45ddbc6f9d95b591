"""One bucket of parameters that replicas train apart: its anchor, its outer momentum, and its exchange."""

import torch
import torch.distributed as dist

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.buckets import Bucket
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.group import ranks_of
from penstock.compression.local.outer_step import OuterStep
from penstock.compression.reduction import LocalReduction, Reduction, make_reduction


class AnchoredBucket:
    """Parameters, and beside them what all replicas agree on.

    Args:
        layout: Which parameters, and where they lie.
        outer: What is done with the average of the replicas' ways.
        algorithm: Compressor of this replica's way; None sends it as it is.
        group: The replicas.
        alone: There is but this one, whatever the group.
        error_feedback: Carry over what compression leaves out.
        error_decay: What was carried over is multiplied by this first.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Attributes:
        anchor: The parameters as of the last exchange, the same on every replica, ``[layout.numel]``.
        momentum: Of the outer step; None without.
        exchanged: This replica's way before an exchange, the mean of all after it.
        memory: The error memories; None where nothing is lost.
        replicas: How many there are.
    """

    def __init__(
        self,
        layout: Bucket,
        outer: OuterStep,
        algorithm: CompressionAlgorithm | None,
        group: dist.ProcessGroup | None,
        *,
        alone: bool,
        error_feedback: bool,
        error_decay: float,
        meter: Meter | None,
        watcher: Watcher | None,
    ) -> None:
        self.layout = layout
        self.anchor = layout.new_flat()
        self.anchor_views = layout.views(self.anchor)
        self.momentum = layout.new_flat() if outer.momentum else None
        self.momentum_views = [] if self.momentum is None else layout.views(self.momentum)
        self.exchanged = layout.new_flat()
        self.memory: ErrorMemory | None = None
        self._views = layout.views(self.exchanged)
        self._gaps = layout.gaps(self.exchanged)
        self._outer = outer
        self._error_decay = error_decay
        lossless = algorithm is None or algorithm.lossless
        # The mean of the parameters themselves is exact on one replica; anchor minus the mean way is not.
        self._averages = outer.is_average and (lossless or alone)
        self.replicas = 1 if alone else ranks_of(group)
        self._reduction: Reduction = LocalReduction()
        if alone:
            return
        if error_feedback and not lossless:
            self.memory = ErrorMemory.for_tensor(self.exchanged, group, algorithm=algorithm, parts=layout.parts)
        self._reduction = make_reduction(
            self.exchanged,
            algorithm,
            group,
            memory=self.memory,
            parts=layout.parts,
            factor=1.0 / ranks_of(group),
            key=layout.key,
            meter=meter,
            watcher=watcher,
        )

    def drop_anchor(self) -> None:
        """The parameters, which are the same on every replica now, become the anchor."""
        for view, parameter in zip(self.anchor_views, self.layout.parameters, strict=True):
            view.copy_(parameter.detach())

    def start(self, step: int) -> None:
        """Launch the exchange of how far this replica is from the anchor after ``step`` steps."""
        for gap in self._gaps:
            gap.zero_()
        for view, anchor, parameter in zip(self._views, self.anchor_views, self.layout.parameters, strict=True):
            if self._averages:
                view.copy_(parameter.detach())
            else:
                # The way starts where the replica was put. In half precision that is not the anchor, but its rounding:
                # from the anchor a replica would seem to move when it does not, and a momentum would feed on that.
                view.copy_(anchor.to(parameter.dtype)).sub_(parameter.detach())
        if self.memory is not None and self._error_decay != 1.0:
            self.memory.worker.mul_(self._error_decay)
        self._reduction.start(step)

    def advance(self) -> None:
        """Launch the exchange's second collective, if it has one."""
        self._reduction.advance()

    def wait(self) -> None:
        """The mean of the replicas' ways is in :attr:`exchanged` after this."""
        self._reduction.wait()

    def exchanged_is_finite(self) -> bool:
        """Whether the mean holds neither NaN nor infinity."""
        return bool(torch.isfinite(self.exchanged.sum())) or bool(torch.isfinite(self.exchanged).all())

    def move_anchor(self) -> None:
        """The outer step, from the mean of the replicas' ways."""
        for gap in self._gaps:
            gap.zero_()
        if self._averages:
            self.anchor.copy_(self.exchanged)
        else:
            self._outer.apply_(self.anchor, self.exchanged, self.momentum)

    def adopt(self, mixing: float = 0.0) -> None:
        """Parameters become ``mixing`` times themselves plus ``1 - mixing`` times the anchor."""
        for view, parameter in zip(self.anchor_views, self.layout.parameters, strict=True):
            if not parameter.requires_grad:
                continue
            if mixing == 0.0:
                parameter.copy_(view)
            else:
                parameter.copy_(torch.lerp(view, parameter.detach().to(view.dtype), mixing))
