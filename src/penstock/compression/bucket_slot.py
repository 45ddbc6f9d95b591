"""A bucket of parameters with what its reduction needs."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock._core.meter import Meter
from penstock._core.sharded import here
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.buckets import Bucket
from penstock.compression.error_feedback import CLASSIC, FeedbackRule
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.masks import flat_mask
from penstock.compression.reduction import Reduction, make_reduction


class BucketSlot:
    """A bucket with its buffer, its memories and its reductions."""

    def __init__(
        self,
        bucket: Bucket,
        algorithm: CompressionAlgorithm | None,
        group: dist.ProcessGroup | None,
        *,
        feedback: bool | FeedbackRule,
        masks: Mapping[str, Tensor],
        inside: dist.ProcessGroup | None,
        uncompressed_first: bool,
        meter: Meter | None,
        watcher: Watcher | None,
    ) -> None:
        self.bucket = bucket
        self.pending: set[nn.Parameter] = set(bucket.parameters)
        self._flat = bucket.new_flat()
        self._views = bucket.views(self._flat)
        self._gaps = bucket.gaps(self._flat)
        self.memory: ErrorMemory | None = None
        if feedback and algorithm is not None and not algorithm.lossless:
            self.memory = ErrorMemory.for_tensor(
                self._flat,
                group,
                algorithm=algorithm,
                rule=feedback if isinstance(feedback, FeedbackRule) else CLASSIC,
                parts=bucket.parts,
                inside=inside,
            )
        self._mask: Tensor | None = None
        if algorithm is not None and masks:
            ones = bucket.new_flat()
            self._mask = flat_mask(ones, bucket.names, bucket.views(ones), masks)
        self._compressed = make_reduction(
            self._flat,
            algorithm,
            group,
            memory=self.memory,
            parts=bucket.parts,
            inside=inside,
            key=bucket.key,
            meter=meter,
            watcher=watcher,
        )
        self._plain: Reduction | None = None
        if uncompressed_first:
            self._plain = make_reduction(self._flat, None, group, inside=inside, meter=meter, watcher=watcher)

    def reduction(self, compressed: bool) -> Reduction:
        """The reduction of this step: during warm-up the uncompressed one."""
        if compressed or self._plain is None:
            return self._compressed
        return self._plain

    @torch.no_grad()
    def fill(self, weight: float) -> None:
        """Weighted gradients into the buffer; what the last sum left in the gaps would disturb the scales."""
        for gap in self._gaps:
            gap.zero_()
        for parameter, view in zip(self.bucket.parameters, self._views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(here(parameter.grad))
        self._flat.mul_(weight)

    @torch.no_grad()
    def write_back(self) -> None:
        """The result into every ``.grad``; what a mask cuts off is neither sent nor owed."""
        if self._mask is not None:
            self._flat.mul_(self._mask)
            if self.memory is not None:
                self.memory.cut_off(self._mask)
        for parameter, view in zip(self.bucket.parameters, self._views, strict=True):
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            here(parameter.grad).copy_(view)
