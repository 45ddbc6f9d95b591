"""The mesh that a stage's parameters are divided over."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from penstock.pipe.groups import PipeGroups


def stage_mesh(groups: PipeGroups) -> DeviceMesh:
    """The ranks that hold a rank's stages, by ``"data"`` and ``"model"``, as far as there are several of each.

    A parameter may be divided along both, which torch does on parts of one mesh only.

    Args:
        groups: Of this rank, with replicas or a model axis; their process groups are the mesh's.
    """
    named = {"data": groups.replicas, "model": groups.model}
    made = {name: group for name, group in named.items() if group is not None}
    first = {"pipe": groups.pipe_rank, "data": groups.replica, "model": groups.model_rank}
    axes = groups.topology.get_axis_names()

    def rank(**place: int) -> int:
        return groups.topology.get_rank(**{axis: {**first, **place}.get(axis, 0) for axis in axes})

    ranks = [[rank(data=d, model=m) for m in range(groups.num_model_ranks)] for d in range(groups.num_replicas)]
    mesh = torch.tensor(ranks).view(
        [groups.num_replicas if name == "data" else groups.num_model_ranks for name in made]
    )
    names, found = tuple(made), list(made.values())
    if len(found) == 1:
        return DeviceMesh.from_group(found[0], groups.device.type, mesh_dim_names=names)
    return DeviceMesh.from_group(found, groups.device.type, mesh=mesh, mesh_dim_names=names)
