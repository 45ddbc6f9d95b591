"""This process's place in the run: rank, world size, device, rendezvous store."""

import datetime
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from penstock._core.waiting import Watcher
from penstock.pipe.agreement import agree
from penstock.runtime.launch import launched

if TYPE_CHECKING:  # a compiled type: torch.distributed exports it at run time only
    from torch._C._distributed_c10d import Store

# Gloo's threads take the interpreter to let go of the last collectives. One that comes for it when the interpreter is
# gone already aborts a process that was about to end well ("terminate called without an active exception").
_LET_GO_S: Final = 0.1


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Attributes:
        rank: From 0 to ``world_size - 1``.
        world_size: How many processes the run has.
        device: Where this process computes.
        store: The rendezvous store, None when the run is this process alone.
        owns_group: Whether :meth:`join` made the default process group (and :meth:`leave` ends it).
    """

    rank: int
    world_size: int
    device: torch.device
    store: "Store | None"
    owns_group: bool

    @classmethod
    def planned_world_size(cls) -> int:
        """How many processes this run has, known before any process group is made."""
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size()
        return int(os.environ["WORLD_SIZE"]) if launched() else 1

    @classmethod
    def join(cls, deadline_s: float) -> Self:
        """Join the run: use the default process group, or make it from the launcher's environment variables.

        Args:
            deadline_s: How long the other ranks may take to arrive, and the time limit of every collective, in seconds.

        Raises:
            WaitError: Ranks did not arrive within the deadline; the message names them.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        owns = False
        if launched() and not dist.is_initialized():
            _init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", deadline_s)
            owns = True
        if not dist.is_initialized():
            return cls(0, 1, device, None, owns_group=False)
        store = dist.distributed_c10d._get_default_store()
        return cls(dist.get_rank(), dist.get_world_size(), device, store, owns)

    def leave(self) -> None:
        """End the process group if :meth:`join` made it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(_LET_GO_S)


def _init_process_group(backend: str, deadline_s: float) -> None:
    """As ``dist.init_process_group(backend)``, but ranks that do not arrive are named."""
    timeout = datetime.timedelta(seconds=deadline_s)
    watcher = Watcher(rank=int(os.environ["RANK"]), deadline_s=deadline_s)
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    # torch's own limit is the same; the watcher's comes a little later.
    with watcher.waiting(f"joining {os.environ['WORLD_SIZE']} processes at the store of rank 0, {place}"):
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    facts = {"number of processes": world_size}
    agree("the start", facts, store=store, rank=rank, world_size=world_size, watcher=watcher)
    # A launcher's store outlives a process group: what a group before this one left there is not to be found again.
    times = store.add(f"penstock/joined/{rank}", 1)
    store = dist.PrefixStore(f"penstock/processes/{times}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
