"""Tensors that lie in parts on several ranks, as torch's DTensors."""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:  # half a second of importing, for runs that shard nothing too
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor, axis: str | None = None) -> "TypeGuard[DTensor]":
    """Whether the tensor lies in parts on several ranks.

    Args:
        tensor: Any.
        axis: Only parts over the ranks of this axis, ``"data"`` or ``"model"``, count.
    """
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is not None and (axis is None or axis in (mesh.mesh_dim_names or ()))


def here(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank; of a plain one, all of it."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part
