"""Gives one rank's value to other ranks of a group."""

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import CONTROL, Meter
from penstock._core.waiting import Watcher
from penstock.pipe.frame import HEADER_BYTES, Address, Header, LayoutCache, copy_into, read_layout, views, write_head
from penstock.pipe.value import flatten, to_device, unflatten


def broadcast_value(
    value: Any,
    *,
    source: int,
    targets: Collection[int] | None = None,
    group: dist.ProcessGroup,
    device: torch.device,
    watcher: Watcher,
    meter: Meter,
) -> Any:
    """Send a value from one rank to others. Collective.

    Args:
        value: Any nest that may pass between stages; ignored but on the source.
        source: A rank of the group.
        targets: Ranks of the group that are to have it, the same on every rank; None is all of them.
        group: On gloo.
        device: Where the others want their tensors; they all arrive there.
        watcher: Told of the wait.
        meter: Counts the bytes (``control``).

    Returns:
        The value; on the source, the very one given; None on ranks that are neither source nor target.
    """
    rank = dist.get_rank(group)
    mine = rank == source
    others = None if targets is None else sorted(set(targets) - {source})
    if not mine and others is not None and rank not in others:
        return None
    cache = LayoutCache()
    address = Address("F", 0, 0, 0)
    head = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    frame = head
    if mine:
        structure, tensors = flatten(value, what="the output")
        tensors = [tensor.detach().cpu() for tensor in tensors]
        layout = cache.of(structure, tensors, [False] * len(tensors))
        header = layout.header(address, ())
        frame = torch.zeros(header.frame_bytes, dtype=torch.uint8)
        write_head(frame.numpy().data, header, layout.preamble, ())
        copy_into(views(frame.numpy(), None, header.data_start, layout), tensors)
        head = frame[:HEADER_BYTES].clone()
    with watcher.waiting("broadcast of outputs", peer=None if mine else dist.get_global_rank(group, source)):
        _pass(head, source, others, group)
        header = Header.read(head.numpy().data, address)
        if not mine:
            frame = torch.empty(header.frame_bytes, dtype=torch.uint8)
        _pass(frame, source, others, group)
    nbytes = HEADER_BYTES + frame.nbytes
    if mine:
        meter.count(CONTROL, sent=nbytes * (1 if others is None else len(others)))
        return value
    meter.count(CONTROL, received=nbytes)
    layout = read_layout(frame.numpy().data, header, cache)
    return to_device(unflatten(layout.structure, views(frame.numpy(), None, header.data_start, layout)), device)


def _pass(tensor: Tensor, source: int, others: list[int] | None, group: dist.ProcessGroup) -> None:
    if others is None:
        dist.broadcast(tensor, group=group, group_src=source)
    elif dist.get_rank(group) == source:
        for other in others:
            dist.send(tensor, group=group, group_dst=other)
    else:
        dist.recv(tensor, group=group, group_src=source)
