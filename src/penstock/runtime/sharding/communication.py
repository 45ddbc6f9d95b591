"""FSDP2's collectives, counted and watched like all others of a run."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from penstock._core.meter import REPLICAS, Meter
from penstock._core.waiting import Watcher


class _Buffers:
    """Fresh memory for every call."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor."""
        return torch.empty(*size, dtype=dtype, device=device)


class GatherParameters(_Buffers, AllGather):
    """All-gather of a layer's parameters."""

    def __init__(self, meter: Meter, watcher: Watcher, stage: int) -> None:
        self._meter = meter
        self._watcher = watcher
        self._stage = stage

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        """Start it, and on a CPU wait for it, where FSDP2 would wait without a word."""
        self._meter.all_gather(REPLICAS, input_tensor.nbytes, dist.get_world_size(group))
        if async_op and output_tensor.is_cuda:
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=True)
        with self._watcher.waiting("all-gather of sharded parameters", stage=self._stage):
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group)


class ScatterGradients(_Buffers, ReduceScatter):
    """Reduce-scatter of a layer's gradients."""

    def __init__(self, meter: Meter, watcher: Watcher, stage: int) -> None:
        self._meter = meter
        self._watcher = watcher
        self._stage = stage

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        """Reduce, and wait."""
        ranks = dist.get_world_size(group)
        share = input_tensor.nbytes * (ranks - 1) // ranks
        self._meter.count(REPLICAS, sent=share, received=share)
        with self._watcher.waiting("reduce-scatter of sharded gradients", stage=self._stage):
            return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
