"""A tensor that lies in parts on the replicas: its whole, and the part of a whole that belongs here."""

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import CONTROL, Meter
from penstock._core.sharded import here, is_sharded

if TYPE_CHECKING:  # half a second of importing, for runs that shard nothing too
    from torch.distributed.tensor import DTensor


def full_tensor(tensor: Tensor, *, group: dist.ProcessGroup | None, meter: Meter) -> Tensor:
    """The whole tensor; a plain one is returned as it is.

    torch's own ``DTensor.full_tensor`` remembers how it did the same for an equal mesh, and so the process groups of an
    earlier engine in this process, which may be gone.

    Args:
        tensor: Divided along one dimension. Collective over the ranks that hold its parts.
        group: These ranks.
        meter: Counts the bytes (``control``).
    """
    if not is_sharded(tensor):
        return tensor
    assert group is not None  # nothing is divided over one rank
    dim, ranks = _divided_dimension(tensor), dist.get_world_size(group)
    part = here(tensor).detach().movedim(dim, 0)
    rows = -(-tensor.shape[dim] // ranks)
    padded = part.new_zeros(rows, *part.shape[1:])
    padded[: part.shape[0]] = part
    whole = part.new_empty(rows * ranks, *part.shape[1:])
    dist.all_gather_into_tensor(whole, padded, group=group)
    meter.all_gather(CONTROL, padded.nbytes, ranks)
    return whole[: tensor.shape[dim]].movedim(0, dim)


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that a sharded tensor of the same shape holds on this rank; a view.

    Args:
        whole: The same on every rank.
        like: A tensor that is divided along one dimension, or a plain tensor, which holds everything.
    """
    if not is_sharded(like):
        return whole
    dim, ranks = _divided_dimension(like), like.device_mesh.size()
    rows = -(-like.shape[dim] // ranks)  # as torch.chunk divides: the last parts may be smaller, or empty
    place = like.device_mesh.get_coordinate()
    assert place is not None  # this rank is one of those that hold the tensor
    start = min(place[0] * rows, like.shape[dim])
    return whole.narrow(dim, start, min(rows, like.shape[dim] - start))


def divided_like(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of ``whole``, divided as ``like`` is."""
    if not is_sharded(like):
        return whole.clone()
    from torch.distributed.tensor import DTensor

    part = local_part(whole, like).contiguous().clone()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def squared_norm(gradient: Tensor, *, copies: int = 1, part_copies: int = 1) -> Tensor:
    """This rank's share of a squared norm, in float64 on the CPU.

    Shares are to be added up over ranks of which several may hold the same, so each counts its part of it.

    Args:
        gradient: A parameter's.
        copies: Ranks that hold it, if it is whole.
        part_copies: Ranks that hold the same part of it, if it is divided.
    """
    square = here(gradient).detach().double().square().sum().cpu()
    return square / (part_copies if is_sharded(gradient) else copies)


def _divided_dimension(tensor: "DTensor") -> int:
    (placement,) = tensor.placements
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim
