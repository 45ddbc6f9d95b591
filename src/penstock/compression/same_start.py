"""Replicas that start from different weights train apart without a sign of it; so they are compared once."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import CONTROL, Meter
from penstock._core.sharded import here
from penstock._core.waiting import Watcher
from penstock.compression.group import ranks_of


def check_same_start(
    parameters: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    *,
    meter: Meter | None = None,
    watcher: Watcher | None = None,
) -> None:
    """Compare a digest of all parameters over the replicas. Collective.

    Args:
        parameters: In the same order on every replica; at least one.
        group: The replicas; None is the default group.
        meter: Counts the 64 bytes.
        watcher: Bounds the wait.

    Raises:
        ValueError: The parameters differ; raised on every replica.
    """
    ranks = ranks_of(group)
    if ranks == 1 or not parameters:
        return
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(here(parameter).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    mine = torch.from_numpy(np.frombuffer(digest.digest(), dtype=np.int64).copy()).to(parameters[0].device)
    low, high = mine.clone(), mine.clone()
    work = [
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group, async_op=True),
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group, async_op=True),
    ]
    for pending in work:
        if watcher is None:
            pending.wait()
        else:
            with watcher.waiting("comparing the replicas' weights"):
                pending.wait()
    if meter is not None:
        meter.all_reduce(CONTROL, low.nbytes + high.nbytes, ranks)
    if not torch.equal(low, high):
        raise ValueError(
            "the replicas start from different weights, so they would train apart; seed them alike "
            "(torch.manual_seed before the model is built), load one checkpoint on all, or broadcast the parameters "
            "from one rank (torch.distributed.broadcast)"
        )
