"""A tensor that lies in parts on the replicas: its whole, and the part of a whole that belongs here."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import CONTROL, Meter
from penstock._core.sharded import here, is_sharded
from penstock.pipe.groups import PipeGroups

if TYPE_CHECKING:  # half a second of importing, for runs that shard nothing too
    from torch.distributed.tensor import DTensor


class _Division(NamedTuple):
    """How a tensor is divided over one axis of ranks, as ``torch.chunk`` does: the last parts may be smaller, or empty.

    Attributes:
        axis: ``"model"`` or ``"data"``.
        dim: The dimension divided.
        start: Where this rank's part begins, of what is divided.
        length: Of this rank's part.
        rows: Of the largest part.
        size: Of what is divided.
    """

    axis: str
    dim: int
    start: int
    length: int
    rows: int
    size: int


def full_tensor(tensor: Tensor, *, groups: PipeGroups, meter: Meter) -> Tensor:
    """The whole tensor; a plain one is returned as it is.

    torch's own ``DTensor.full_tensor`` remembers how it did the same for an equal mesh, and so the process groups of an
    earlier engine in this process, which may be gone.

    Args:
        tensor: Collective over the ranks that hold its parts.
        groups: Of the run.
        meter: Counts the bytes (``control``).
    """
    if not is_sharded(tensor):
        return tensor
    part = here(tensor).detach()
    for division in reversed(_divisions(tensor)):
        group = groups.replicas if division.axis == "data" else groups.model
        assert group is not None  # nothing is divided over one rank
        ranks = dist.get_world_size(group)
        part = part.movedim(division.dim, 0)
        padded = part.new_zeros(division.rows, *part.shape[1:])
        padded[: part.shape[0]] = part
        whole = part.new_empty(division.rows * ranks, *part.shape[1:])
        dist.all_gather_into_tensor(whole, padded, group=group)
        meter.all_gather(CONTROL, padded.nbytes, ranks)
        part = whole[: division.size].movedim(0, division.dim)
    return part


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that a sharded tensor of the same shape holds on this rank; a view.

    Args:
        whole: The same on every rank.
        like: A divided tensor, or a plain one, which holds everything.
    """
    if is_sharded(like):
        for division in _divisions(like):
            whole = whole.narrow(division.dim, division.start, division.length)
    return whole


def divided_like(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of ``whole``, divided as ``like`` is."""
    if not is_sharded(like):
        return whole.clone()
    from torch.distributed.tensor import DTensor

    part = local_part(whole, like).contiguous().clone()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def squared_norm(gradient: Tensor, axes: Mapping[str, int]) -> Tensor:
    """This rank's share of a squared norm, in float64 on the CPU.

    Args:
        gradient: A parameter's.
        axes: Shares are to be added up over the ranks of these axes, of these sizes. Where the gradient is not divided
            over one, each of its ranks holds the same and counts its part of it.
    """
    square = here(gradient).detach().double().square().sum().cpu()
    return square / math.prod(size for axis, size in axes.items() if not is_sharded(gradient, axis))


def _divisions(tensor: "DTensor") -> list[_Division]:
    """First over the ``model`` axis, then what each of its ranks has over the replicas."""
    names, place = tensor.device_mesh.mesh_dim_names, tensor.device_mesh.get_coordinate()
    assert names is not None
    assert place is not None  # this rank is one of those that hold the tensor
    sizes = list(tensor.shape)
    found = []
    for axis in ("model", "data"):
        if axis in names:
            at = names.index(axis)
            dim: int = tensor.placements[at].dim  # type: ignore[attr-defined]
            rows = -(-sizes[dim] // tensor.device_mesh.size(at))
            start = min(place[at] * rows, sizes[dim])
            found.append(_Division(axis, dim, start, min(rows, sizes[dim] - start), rows, sizes[dim]))
            sizes[dim] = found[-1].length
    return found
