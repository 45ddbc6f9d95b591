"""What some replicas owe to an average, owed by another number of replicas."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WORKER, SERVER = ".worker", ".server"


def rechunked(
    states: Sequence[Mapping[str, Any]], mine: Mapping[str, Tensor], chunk_starts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Error memories for one replica, from those of all replicas of another number.

    An average over ``n`` replicas is owed ``mean(worker memories) + server memories``, the server memories lying end
    to end. That sum is kept: each new replica has the mean as its worker memory, and its own part of the row of server
    memories.

    Args:
        states: For each old replica, in rank order, ``{"NAME.worker": [numel], "NAME.server": [its chunk]}``.
        mine: The new replica's memories, whose shapes are wanted.
        chunk_starts: For each NAME, where the new replica's chunk starts.

    Returns:
        Memories with the shapes of ``mine``; with those of the first old replica where they do not belong to the same
        buffers, so that whoever loads them sees that they do not fit.
    """
    if not states or any(state.keys() != states[0].keys() for state in states):
        return {}
    result: dict[str, Tensor] = {}
    for name in states[0]:
        if name.endswith(WORKER):
            workers = [state[name] for state in states]
            if any(worker.shape != workers[0].shape for worker in workers):
                return {}
            result[name] = torch.stack(workers).mean(dim=0)
        elif name.endswith(SERVER):
            row = torch.cat([state[name] for state in states])
            start = chunk_starts.get(name.removesuffix(SERVER), 0)
            size = mine[name].numel() if name in mine else 0
            result[name] = row[start : start + size]
        else:  # where an iteration starts, for example: the same on all
            result[name] = states[0][name]
    return result
