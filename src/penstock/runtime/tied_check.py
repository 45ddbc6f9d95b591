"""Proves that the copies of tied weights on several stages are still the same bits."""

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from penstock._core.meter import CONTROL, Meter
from penstock._core.sharded import here


class TiedCopiesError(RuntimeError):
    """Copies of one tied weight differ between stages; the run is not the model that was asked for."""


def check_copies(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, group: dist.ProcessGroup, meter: Meter | None = None
) -> None:
    """Compare digests of the tied parameters over the stages that own a copy.

    Args:
        named_parameters: The local copies under their canonical names, in the same order on every rank of the group.
        group: The ranks that own a copy, for one replica.
        meter: Where the bytes are counted.

    Raises:
        TiedCopiesError: Some copy differs; names the weights and the rank.
    """
    pairs = list(named_parameters)
    digests = [_digest(parameter) for _, parameter in pairs]
    mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8)
    ranks = dist.get_world_size(group)
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(everyone, mine, group=group)
    if meter is not None:
        meter.all_gather(CONTROL, mine.numel(), ranks)
    for peer, theirs in enumerate(everyone):
        if torch.equal(theirs, everyone[0]):
            continue
        width = len(digests[0])
        differing = [
            name
            for i, (name, _) in enumerate(pairs)
            if not torch.equal(theirs[i * width : (i + 1) * width], everyone[0][i * width : (i + 1) * width])
        ]
        first, other = dist.get_global_rank(group, 0), dist.get_global_rank(group, peer)
        raise TiedCopiesError(f"tied weights {differing} differ between rank {first} and rank {other}")


def _digest(parameter: nn.Parameter) -> bytes:
    data = here(parameter).detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).digest()
