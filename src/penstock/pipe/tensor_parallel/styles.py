"""How a submodule computes with its part of a weight.

These stand beside torch's own ``ColwiseParallel`` and ``RowwiseParallel`` and divide parameters as they do, into
DTensors over the mesh of the ``model`` axis; any optimizer that works element by element then works on them, and a
checkpoint knows the whole from the parts. The products are taken on the local parts and the sums are this package's
own, which are counted and watched; those that DTensors start by themselves are neither.
"""

from collections.abc import Callable
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from penstock._core.sharded import here
from penstock.pipe.tensor_parallel.ranks import ModelRanks


class Columns(ParallelStyle):
    """A linear layer divided by its output features."""

    def __init__(self, ranks: ModelRanks, *, gather: bool = False) -> None:
        self._ranks = ranks
        self._gather = gather

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        divide_parameter(module, "weight", device_mesh, self._ranks, dim=0)
        if getattr(module, "bias", None) is not None:
            divide_parameter(module, "bias", device_mesh, self._ranks, dim=0)
        ranks = self._ranks

        def forward(x: Tensor) -> Tensor:
            weight, bias = _parameter(module, "weight"), getattr(module, "bias", None)
            part = F.linear(ranks.summed_backward(x), here(weight), None if bias is None else here(bias))
            return ranks.gathered(part, weight.shape[0]) if self._gather else part

        module.forward = forward
        return module


class Rows(ParallelStyle):
    """A linear layer divided by its input features, of which it is given its own; the bias is whole on every rank."""

    def __init__(self, ranks: ModelRanks) -> None:
        self._ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        divide_parameter(module, "weight", device_mesh, self._ranks, dim=1)
        ranks = self._ranks

        def forward(x: Tensor) -> Tensor:
            y = ranks.summed(F.linear(x, here(_parameter(module, "weight"))))
            bias = getattr(module, "bias", None)
            return y if bias is None else y + bias

        module.forward = forward
        return module


class Vocabulary(ParallelStyle):
    """Token vectors divided by tokens: a token is looked up where its vector lies, and elsewhere is zero."""

    def __init__(self, ranks: ModelRanks) -> None:
        self._ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        divide_parameter(module, "weight", device_mesh, self._ranks, dim=0)
        ranks, vocabulary = self._ranks, _parameter(module, "weight").shape[0]
        mine = ranks.share(vocabulary)

        def lookup(ids_BS: Tensor) -> Tensor:
            elsewhere_BS = (ids_BS < mine.start) | (ids_BS >= mine.stop)
            weight = here(_parameter(module, "weight"))
            part_BSD = F.embedding((ids_BS - mine.start).masked_fill(elsewhere_BS, 0), weight)
            return ranks.summed(part_BSD.masked_fill(elsewhere_BS.unsqueeze(-1), 0.0))

        def logits(x_BSD: Tensor) -> Tensor:
            weight = here(_parameter(module, "weight"))
            return ranks.gathered(F.linear(ranks.summed_backward(x_BSD), weight), vocabulary)

        module.lookup = lookup  # type: ignore[assignment]
        module.logits = logits  # type: ignore[assignment]
        return module


class Heads(ParallelStyle):
    """An attention that computes some of its heads."""

    def __init__(self, ranks: ModelRanks) -> None:
        self._ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        attention: Any = module
        attention.heads = self._ranks.share(len(attention.heads))
        return module


STYLE_OF: Final[dict[str, Callable[[ModelRanks], ParallelStyle]]] = {
    "columns": Columns,
    "gathered_columns": lambda ranks: Columns(ranks, gather=True),
    "rows": Rows,
    "vocabulary": Vocabulary,
    "heads": Heads,
}


def divide_parameter(module: nn.Module, name: str, mesh: DeviceMesh, ranks: ModelRanks, *, dim: int) -> None:
    """Replace a parameter, whole on every rank, by a DTensor of which each holds a part along ``dim``."""
    whole = _parameter(module, name)
    share = ranks.share(whole.shape[dim])
    part = whole.detach().narrow(dim, share.start, len(share)).clone()
    divided = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride())
    module.register_parameter(name, nn.Parameter(divided, requires_grad=whole.requires_grad))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    return module.get_parameter(name)
