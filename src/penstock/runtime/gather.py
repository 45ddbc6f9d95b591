"""Small JSON values between ranks, without pickle."""

import json
from typing import Any

import torch
import torch.distributed as dist

from penstock._core.meter import CONTROL, Meter
from penstock._core.waiting import Watcher


def gather_json(value: Any, *, group: dist.ProcessGroup | None = None, meter: Meter | None = None) -> list[Any]:
    """Give every rank of a group the JSON values of all of them, in rank order.

    Args:
        value: This rank's JSON value; ranks may hold values of different sizes.
        group: Who takes part; None is everyone. Without a process group the answer is ``[value]``.
        meter: Where the bytes are counted.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    device = torch.device("cpu")
    if dist.get_backend(group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    ranks = dist.get_world_size(group)
    data = torch.frombuffer(bytearray(json.dumps(value, allow_nan=False).encode()), dtype=torch.uint8).to(device)
    sizes = torch.zeros(ranks, dtype=torch.int64, device=device)
    dist.all_gather_single(sizes, torch.tensor([data.numel()], device=device), group=group)
    width = int(sizes.max())
    padded = torch.zeros(width, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    everyone = torch.empty(ranks * width, dtype=torch.uint8, device=device)
    dist.all_gather_single(everyone, padded, group=group)
    if meter is not None:
        meter.all_gather(CONTROL, width + sizes.element_size(), ranks)
    rows = everyone.view(ranks, width).cpu()
    return [json.loads(bytes(rows[rank, : int(sizes[rank])].tolist())) for rank in range(ranks)]


def any_rank(here: bool, *, what: str, group: dist.ProcessGroup | None, watcher: Watcher, meter: Meter) -> bool:
    """Whether something holds on any rank; every rank of the group calls it.

    Args:
        here: Whether it holds on this one.
        what: For the watcher.
        group: Who takes part, on gloo; None for a world of one.
        watcher: Told of the wait.
        meter: Where the bytes are counted.
    """
    if group is None:
        return here
    flag = torch.tensor(here, dtype=torch.int32)
    with watcher.waiting(what):
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    meter.all_reduce(CONTROL, flag.nbytes, dist.get_world_size(group))
    return bool(flag)
