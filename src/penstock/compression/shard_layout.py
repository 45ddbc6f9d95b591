"""How FSDP2 lays the gradients of a layer out in the one buffer that it reduces."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard


class ShardLayout:
    """A buffer of equal parts, one for each rank: its rows of every parameter, one after another.

    ::

        a [3, k], b [2]   part of rank 0   of rank 1     of rank 2   of rank 3
        2 ranks           a0 a1  b0        a2 --  b1
        4 ranks           a0  b0           a1  b1        a2  --      --  --      -- is padding

    Args:
        shapes: Of the whole parameters, in FSDP2's order.
        ranks: How many ranks divide them.
        rank: Which of these this one is.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], *, ranks: int, rank: int) -> None:
        self.ranks = ranks
        self.rank = rank
        self._shapes = [torch.Size(shape) for shape in shapes]

    @classmethod
    def of(cls, module: nn.Module) -> "ShardLayout | None":
        """Of what FSDP2 reduces for a module together; None where it does not divide all of it by first dimensions.

        Args:
            module: One that ``fully_shard`` was called on.
        """
        assert isinstance(module, FSDPModule)
        # FSDP2 has no public call for which parameters it reduces together, and in which order.
        groups = fully_shard.state(module)._fsdp_param_groups  # type: ignore[attr-defined]
        if len(groups) != 1:
            return None
        sharded = [each.sharded_param for each in groups[0].fsdp_params if each.sharded_param.requires_grad]
        if not sharded or any(tuple(parameter.placements) != (Shard(0),) for parameter in sharded):
            return None
        mesh = sharded[0].device_mesh
        return cls([parameter.shape for parameter in sharded], ranks=mesh.size(), rank=mesh.get_local_rank())

    def numel(self, ranks: int) -> int:
        """Elements of the buffer, padding included."""
        return ranks * sum(self._rows(shape, ranks) * shape[1:].numel() for shape in self._shapes)

    def relaid(self, buffer: Tensor, before: int) -> Tensor:
        """The buffer of ``before`` ranks, ``[numel(before)]``, laid out for these, ``[numel(ranks)]``.

        What lies in the padding is left out; new padding is zeros.
        """
        after = self.ranks
        result = buffer.new_zeros(self.numel(after))
        old, new = buffer.view(before, -1), result.view(after, -1)
        start_old = start_new = 0
        for shape in self._shapes:
            size_old, size_new = (self._rows(shape, ranks) * shape[1:].numel() for ranks in (before, after))
            whole = old[:, start_old : start_old + size_old].reshape(-1)[: shape.numel()]
            padded = buffer.new_zeros(after * size_new)
            padded[: whole.numel()] = whole
            new[:, start_new : start_new + size_new] = padded.view(after, -1)
            start_old, start_new = start_old + size_old, start_new + size_new
        return result

    @staticmethod
    def _rows(shape: torch.Size, ranks: int) -> int:
        return -(-shape[0] // ranks)
