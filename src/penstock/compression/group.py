"""The size of a process group and one's place in it, also where torch.distributed is not in use."""

import torch.distributed as dist


def ranks_of(group: dist.ProcessGroup | None) -> int:
    """Ranks in a group; None is the default group, or one rank where there is none."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process's rank in a group; 0 where there is none."""
    return dist.get_rank(group) if dist.is_initialized() else 0
