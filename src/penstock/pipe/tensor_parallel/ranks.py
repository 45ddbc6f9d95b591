"""The ranks that share a layer, and what they tell each other."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from penstock._core.meter import MODEL, Meter
from penstock._core.waiting import Watcher


class ModelRanks:
    """The ranks of one ``model`` axis. All of them compute the same layers at the same time, in the same order.

    Args:
        group: These ranks.
        stage: For messages.
        meter: Counts the bytes (``model``) and the waiting (``wait_model``).
        watcher: Told of the waits.

    Attributes:
        size: How many they are.
        rank: This one among them.
        group: As given.
    """

    def __init__(self, group: dist.ProcessGroup, *, stage: int, meter: Meter, watcher: Watcher) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._stage = stage
        self._meter = meter
        self._watcher = watcher

    def share(self, size: int) -> range:
        """This rank's part of ``size`` things, as ``torch.chunk`` divides them: the last parts may be smaller."""
        width = -(-size // self.size)
        return range(min(self.rank * width, size), min((self.rank + 1) * width, size))

    def summed_backward(self, x: Tensor) -> Tensor:
        """``x``, whose gradients, a part from each rank, are summed: the way into divided products."""
        found: Tensor = _SummedBackward.apply(x, self)  # type: ignore[no-untyped-call]
        return found

    def summed(self, part: Tensor) -> Tensor:
        """The sum of the parts; each rank gets the whole gradient: the way out of divided products."""
        found: Tensor = _Summed.apply(part, self)  # type: ignore[no-untyped-call]
        return found

    def gathered(self, part: Tensor, size: int) -> Tensor:
        """The parts side by side along the last dimension, of ``size`` in all; each rank keeps its gradient."""
        found: Tensor = _Gathered.apply(part, self, size)  # type: ignore[no-untyped-call]
        return found

    def _sum_(self, x: Tensor) -> Tensor:
        """Sum in place over the ranks, to the same bits on each."""
        with self._meter.timed("wait_model"), self._watcher.waiting("sum over the model axis", stage=self._stage):
            dist.all_reduce(x, group=self.group)
        self._meter.all_reduce(MODEL, x.nbytes, self.size)
        return x

    def _all_gather(self, part: Tensor, size: int) -> Tensor:
        width = -(-size // self.size)
        padded = part if part.shape[-1] == width else torch.nn.functional.pad(part, (0, width - part.shape[-1]))
        parts = padded.new_empty(self.size * padded.numel())
        with self._meter.timed("wait_model"), self._watcher.waiting("gathering over the model axis", stage=self._stage):
            dist.all_gather_single(parts, padded.flatten(), group=self.group)
        self._meter.all_gather(MODEL, padded.nbytes, self.size)
        parts = parts.view(self.size, *padded.shape)
        whole = parts.movedim(0, -2).reshape(*part.shape[:-1], self.size * width)
        return whole[..., :size].contiguous()


class _SummedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: ModelRanks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks._sum_(gradient.clone(memory_format=torch.contiguous_format)), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: ModelRanks) -> Tensor:
        return ranks._sum_(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: ModelRanks, size: int) -> Tensor:
        ctx.share = ranks.share(size)
        return ranks._all_gather(part, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        share = ctx.share
        return gradient[..., share.start : share.stop].contiguous(), None, None
