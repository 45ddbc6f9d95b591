"""Gives all replicas the first one's weights, as DDP does."""

import torch
import torch.distributed as dist

from penstock._core.meter import CONTROL, Meter
from penstock._core.waiting import Watcher
from penstock.pipe.groups import PipeGroups
from penstock.pipe.local_stages import AnyStages


def copy_from_first_replica(stage: AnyStages, groups: PipeGroups, *, meter: Meter, watcher: Watcher) -> None:
    """Overwrite a stage's parameters and buffers with those of its first replica. Collective over the replicas.

    Weights drawn from layer specs are the same everywhere already; a module that each process built for itself, from
    whatever random state it had, is not.
    """
    if groups.replicas is None:
        return
    source = dist.get_global_rank(groups.replicas, 0)
    tensors = [*stage.parameters(), *stage.buffers()]
    with torch.no_grad(), watcher.waiting("copying the first replica's weights", stage=stage.index):
        for tensor in tensors:
            if tensor.numel():
                contiguous = tensor.detach().contiguous()
                dist.broadcast(contiguous, source, group=groups.replicas)
                tensor.copy_(contiguous)
    sent = sum(tensor.nbytes for tensor in tensors)
    if groups.replica == 0:
        meter.count(CONTROL, sent=sent * (groups.num_replicas - 1))
    else:
        meter.count(CONTROL, received=sent)
