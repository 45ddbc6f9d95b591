"""Sums the gradients of tied weights over the pipeline ranks that hold a copy.

A tied weight is one parameter with several copies. Each copy's gradient holds the share of its own uses; the gradient
of the weight is their sum, which every copy then gets, so the copies stay bitwise equal under any optimizer.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock._core.meter import TIED, Meter
from penstock._core.sharded import here
from penstock._core.waiting import Watcher
from penstock.pipe.stage import Stage


class _Weight(NamedTuple):
    """One tied weight: its copies here (on one stage uses share a copy, two stages have two) and their sum's place."""

    copies: list[nn.Parameter]
    total: Tensor


class _Bucket(NamedTuple):
    """Weights that are summed in one go: of the same owners, dtype and device. Without a group, only this rank owns."""

    group: dist.ProcessGroup | None
    flat: Tensor
    weights: list[_Weight]


class TiedGradients:
    """The tied parameters of one rank's stages.

    Args:
        stages: Local stages.
        groups: For each tie key that other ranks hold too, the group of its owners.
        watcher: Told while owners are waited for.
        meter: Counts the bytes (``tied``) and the wait (``wait_tied``).

    Attributes:
        parameters: All tied parameters here, each once, in an order that is the same on every owner.
    """

    def __init__(
        self, stages: Sequence[Stage], groups: Mapping[str, dist.ProcessGroup], *, watcher: Watcher, meter: Meter
    ) -> None:
        self._watcher = watcher
        self._meter = meter
        self.parameters: list[nn.Parameter] = []
        buckets: dict[tuple[dist.ProcessGroup | None, torch.dtype, torch.device], list[list[nn.Parameter]]] = {}
        for (key, _), copies in sorted(_copies_by_name(stages).items(), key=lambda item: item[0]):
            self.parameters += copies
            group = groups.get(key)
            if group is not None or len(copies) > 1:
                buckets.setdefault((group, copies[0].dtype, copies[0].device), []).append(copies)
        self._buckets = [_bucket(group, weights) for (group, _, _), weights in buckets.items()]

    @property
    def ids(self) -> set[int]:
        """``id()`` of each tied parameter."""
        return {id(parameter) for parameter in self.parameters}

    def sum(self) -> None:
        """Leave in each ``.grad`` the sum over all copies. A copy without a gradient counts as zeros."""
        if not self._buckets:
            return
        with self._meter.timed("wait_tied"), self._watcher.waiting("sum of tied gradients"), torch.no_grad():
            works = [self._start(bucket) for bucket in self._buckets]
            for bucket, work in zip(self._buckets, works, strict=True):
                if work is not None:
                    work.wait()
                for weight in bucket.weights:
                    for parameter in weight.copies:
                        if parameter.grad is None:
                            parameter.grad = torch.empty_like(parameter)
                        here(parameter.grad).copy_(weight.total)

    def _start(self, bucket: _Bucket) -> dist.Work | None:
        bucket.flat.zero_()
        for weight in bucket.weights:
            for parameter in weight.copies:
                if parameter.grad is not None:
                    weight.total.add_(here(parameter.grad))
        if bucket.group is None:
            return None
        self._meter.all_reduce(TIED, bucket.flat.nbytes, dist.get_world_size(bucket.group))
        work: dist.Work | None = dist.all_reduce(bucket.flat, group=bucket.group, async_op=True)
        return work


def _copies_by_name(stages: Sequence[Stage]) -> dict[tuple[str, str], list[nn.Parameter]]:
    """The trainable tied parameters by tie key and canonical name."""
    found: dict[tuple[str, str], list[nn.Parameter]] = {}
    for stage in stages:
        for key, named in stage.tied.items():
            for name, parameter in named:
                copies = found.setdefault((key, name), [])
                if parameter.requires_grad and all(parameter is not copy for copy in copies):
                    copies.append(parameter)
    return {where: copies for where, copies in found.items() if copies}


def _bucket(group: dist.ProcessGroup | None, weights: list[list[nn.Parameter]]) -> _Bucket:
    first = weights[0][0]
    shapes = [here(copies[0]).shape for copies in weights]
    sizes = [shape.numel() for shape in shapes]
    flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    totals = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
    return _Bucket(group, flat, [_Weight(copies, total) for copies, total in zip(weights, totals, strict=True)])
