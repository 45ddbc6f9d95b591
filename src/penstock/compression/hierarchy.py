"""Groups for full precision inside a machine and compression between machines."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist


def machine_groups(
    replica_lists: Sequence[Sequence[int]],
    per_machine: int,
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The replicas on this rank's machine, and those with its place on the other machines.

    Collective over the world: every rank makes all groups, in the same order.

    Args:
        replica_lists: For each stage, the ranks that hold it, in an order in which neighbours share a machine
            (``ProcessTopology.get_axis_comm_lists("data")``); ``[range(world_size)]`` where every rank is a replica.
        per_machine: How many replicas each machine holds.
        backend: As of ``torch.distributed.new_group``.
        timeout: The same.

    Returns:
        ``(inside, between)``, as :class:`~penstock.compression.Reducer` takes them.

    Raises:
        ValueError: The replicas do not fill the machines, or this rank is in no list; before any group is made.
    """
    rank = dist.get_rank()
    for ranks in replica_lists:
        if per_machine < 1 or len(ranks) % per_machine:
            raise ValueError(
                f"{len(ranks)} replicas do not fill machines of {per_machine}; take a number that divides "
                f"{len(ranks)}, or 1 to treat all ranks alike"
            )
    if not any(rank in ranks for ranks in replica_lists):
        raise ValueError(f"rank {rank} is in none of the lists of replicas {[list(ranks) for ranks in replica_lists]}")
    inside = between = None
    for ranks in replica_lists:
        for first in range(0, len(ranks), per_machine):
            members = list(ranks[first : first + per_machine])
            group = dist.new_group(members, backend=backend, timeout=timeout, group_desc="inside a machine")
            inside = group if rank in members else inside
        for place in range(per_machine):
            members = list(ranks[place::per_machine])
            group = dist.new_group(members, backend=backend, timeout=timeout, group_desc="between machines")
            between = group if rank in members else between
    assert inside is not None
    assert between is not None
    return inside, between
