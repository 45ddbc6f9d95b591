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
from penstock._core.waiting import Watcher
from penstock.pipe.stage import Stage


class _Bucket(NamedTuple):
    """Gradients that are summed in one go: of the same owners, dtype and device."""

    group: dist.ProcessGroup
    parameters: list[nn.Parameter]
    flat: Tensor
    parts: list[Tensor]


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
        copies: dict[str, dict[int, nn.Parameter]] = {}
        for stage in stages:
            for key, named in stage.tied.items():
                found = copies.setdefault(key, {})
                found.update((id(parameter), parameter) for _, parameter in sorted(named, key=lambda pair: pair[0]))
        self.parameters: list[nn.Parameter] = []
        by_bucket: dict[tuple[dist.ProcessGroup, torch.dtype, torch.device], list[nn.Parameter]] = {}
        for key in sorted(copies):
            for parameter in copies[key].values():
                if not parameter.requires_grad:
                    continue
                self.parameters.append(parameter)
                if key in groups:
                    where = (groups[key], parameter.dtype, parameter.device)
                    by_bucket.setdefault(where, []).append(parameter)
        self._buckets = [_bucket(group, parameters) for (group, _, _), parameters in by_bucket.items()]

    @property
    def ids(self) -> set[int]:
        """``id()`` of each tied parameter."""
        return {id(parameter) for parameter in self.parameters}

    def sum(self) -> None:
        """Leave in each ``.grad`` the sum over all owners. A copy without a gradient counts as zeros."""
        if not self._buckets:
            return
        with self._meter.timed("wait_tied"), self._watcher.waiting("sum of tied gradients"), torch.no_grad():
            works = []
            for group, parameters, flat, parts in self._buckets:
                for parameter, part in zip(parameters, parts, strict=True):
                    if parameter.grad is None:
                        part.zero_()
                    else:
                        part.copy_(parameter.grad)
                works.append(dist.all_reduce(flat, group=group, async_op=True))
                self._meter.all_reduce(TIED, flat.nbytes, dist.get_world_size(group))
            for work, (_, parameters, _, parts) in zip(works, self._buckets, strict=True):
                assert work is not None
                work.wait()
                for parameter, part in zip(parameters, parts, strict=True):
                    if parameter.grad is None:
                        parameter.grad = part.clone()
                    else:
                        parameter.grad.copy_(part)


def _bucket(group: dist.ProcessGroup, parameters: list[nn.Parameter]) -> _Bucket:
    flat = torch.zeros(
        sum(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype, device=parameters[0].device
    )
    pieces = flat.split([parameter.numel() for parameter in parameters])
    parts = [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]
    return _Bucket(group, parameters, flat, parts)
