"""Gives all replicas the first one's weights, as DDP does."""

import torch
import torch.distributed as dist

from penstock._core.meter import CONTROL, Meter
from penstock._core.waiting import Watcher
from penstock.pipe.groups import PipeGroups
from penstock.pipe.local_stages import AnyStages


def copy_from_first_replica(stage: AnyStages, groups: PipeGroups, *, meter: Meter, watcher: Watcher) -> None:
    """Overwrite a stage's parameters and buffers with those of its first replica. Collective over all that hold it.

    Weights drawn from layer specs are the same everywhere already; a module that each process built for itself, from
    whatever random state it had, is not.
    """
    for group in (groups.replicas, groups.model):
        if group is not None:
            _copy_from_first(stage, group, meter=meter, watcher=watcher)


def _copy_from_first(stage: AnyStages, group: dist.ProcessGroup, *, meter: Meter, watcher: Watcher) -> None:
    source = dist.get_global_rank(group, 0)
    tensors = [*stage.parameters(), *stage.buffers()]
    with torch.no_grad(), watcher.waiting("copying the first replica's weights", stage=stage.index):
        for tensor in tensors:
            if tensor.numel():
                contiguous = tensor.detach().contiguous()
                dist.broadcast(contiguous, source, group=group)
                tensor.copy_(contiguous)
    sent = sum(tensor.nbytes for tensor in tensors)
    if dist.get_rank(group) == 0:
        meter.count(CONTROL, sent=sent * (dist.get_world_size(group) - 1))
    else:
        meter.count(CONTROL, received=sent)
