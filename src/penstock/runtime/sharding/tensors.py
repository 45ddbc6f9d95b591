"""A tensor that lies in parts on the replicas: its whole, and the part of a whole that belongs here."""

from typing import TYPE_CHECKING, TypeGuard

import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import CONTROL, Meter

if TYPE_CHECKING:  # half a second of importing, for runs that shard nothing too
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether the tensor lies in parts on several ranks."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor, *, group: dist.ProcessGroup | None, meter: Meter) -> Tensor:
    """The whole tensor; a plain one is returned as it is.

    torch's own ``DTensor.full_tensor`` remembers how it did the same for an equal mesh, and so the process groups of an
    earlier engine in this process, which may be gone.

    Args:
        tensor: Divided along its first dimension. Collective over the ranks that hold its parts.
        group: These ranks.
        meter: Counts the bytes (``control``).
    """
    if not is_sharded(tensor):
        return tensor
    assert group is not None  # nothing is divided over one replica
    part, ranks = here(tensor).detach(), dist.get_world_size(group)
    rows = -(-tensor.shape[0] // ranks)
    padded = part.new_zeros(rows, *part.shape[1:])
    padded[: part.shape[0]] = part
    whole = part.new_empty(rows * ranks, *part.shape[1:])
    dist.all_gather_into_tensor(whole, padded, group=group)
    meter.all_gather(CONTROL, padded.nbytes, ranks)
    return whole[: tensor.shape[0]]


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that a sharded tensor of the same shape holds on this rank; a view.

    Args:
        whole: The same on every rank.
        like: A tensor that FSDP2 divided along its first dimension, or a plain tensor, which holds everything.
    """
    if not is_sharded(like):
        return whole
    ranks = like.device_mesh.size()
    rows = -(-like.shape[0] // ranks)  # as torch.chunk divides: the last parts may be smaller, or empty
    place = like.device_mesh.get_coordinate()
    assert place is not None  # this rank is one of those that hold the tensor
    start = min(place[0] * rows, like.shape[0])
    return whole[start : start + rows]


def divided_like(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of ``whole``, divided as ``like`` is."""
    if not is_sharded(like):
        return whole.clone()
    from torch.distributed.tensor import DTensor

    part = local_part(whole, like).clone()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def here(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part


def squared_norm(gradient: Tensor, replicas: int) -> Tensor:
    """This rank's share of a squared norm, in float64 on the CPU.

    Shares are to be added up over pipeline and replicas, so of a gradient that every replica holds whole each counts
    its part of ``1 / replicas``.
    """
    square = here(gradient).detach().double().square().sum().cpu()
    return square if is_sharded(gradient) else square / replicas
