"""What some replicas owe to an average, owed by another number of replicas."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.compression.error_memory import ErrorMemory

WORKER, SERVER = ".worker", ".server"


def rechunked(
    states: Sequence[Mapping[str, Any]], memories: Mapping[str, ErrorMemory], *, replicas: int, of_sum: bool = False
) -> dict[str, Tensor]:
    """Error memories for one replica, from those of all replicas of another number.

    An average over ``n`` replicas is owed ``mean(worker memories) + server memories``, the server memories lying end
    to end. A sum is owed ``sum(worker memories) + server memories``, and so is an average whose exchange divides by
    ``n`` what it compresses. What is owed is kept: each new replica has the mean of the worker memories, or its share
    of their sum, and its own part of the row of server memories.

    Args:
        states: For each old replica, in rank order, ``{"NAME.worker": [numel], "NAME.server": [its chunk]}``.
        memories: The new replica's, by NAME.
        replicas: How many new ones there are.
        of_sum: What is exchanged is a sum, not an average.

    Returns:
        Tensors by names as in ``states``, with the shapes of ``memories``; with those of the first old replica where
        they do not belong to the same buffers, so that whoever loads them sees that they do not fit.
    """
    if not states or any(state.keys() != states[0].keys() for state in states):
        return {}
    result: dict[str, Tensor] = {}
    for name in states[0]:
        mine = memories.get(name.rpartition(".")[0])
        if name.endswith(WORKER):
            workers = [state[name] for state in states]
            if any(worker.shape != workers[0].shape for worker in workers):
                return {}
            summed = of_sum or (mine is not None and mine.divided)
            result[name] = torch.stack(workers).sum(dim=0) / (replicas if summed else len(workers))
        elif name.endswith(SERVER):
            row = torch.cat([state[name] for state in states])
            start, size = (0, 0) if mine is None else (mine.chunk_start, mine.server.numel())
            result[name] = row[start : start + size]
        else:  # where an iteration starts, for example: the same on all
            result[name] = states[0][name]
    return result
