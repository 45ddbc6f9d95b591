"""What every reduction is: stages, each of which launches one collective and waits for none but the last one's."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import REPLICAS, Meter
from penstock._core.waiting import Watcher


class Reduction(Protocol):
    """A sum of one flat tensor over a group, in place.

    Several may be in flight; every rank must call ``start`` and ``advance`` of all of them in the same order.
    """

    def start(self, step: int | None = None) -> None:
        """Read the tensor and launch the first collective.

        Args:
            step: Which step this is, from 0: it keys random choices and times the memory's resets. None counts by
                itself, from 0, and starts there again when a run is resumed.
        """

    def advance(self) -> bool:
        """Wait for the last launched collective and launch the next; False when that was all."""

    def wait(self) -> None:
        """Advance to the end: the tensor holds the result."""


class LocalReduction:
    """The sum over one rank, or of no elements: nothing is sent, so nothing is compressed."""

    def start(self, step: int | None = None) -> None:
        """Nothing to launch."""

    def advance(self) -> bool:
        """Nothing to launch."""
        return False

    def wait(self) -> None:
        """Nothing to wait for."""


class Launched(NamedTuple):
    """A collective under way and what to call it while waiting."""

    work: dist.Work
    action: str


class StagedReduction(ABC):
    """Runs :meth:`_stages`, a generator that launches a collective, yields it and goes on when it has ended.

    Args:
        wires: How bytes are counted and waits watched.
    """

    def __init__(self, wires: "Wires") -> None:
        self._wires = wires
        self._calls = 0
        self._running: Iterator[Launched] | None = None
        self._pending: Launched | None = None

    @abstractmethod
    def _stages(self, step: int) -> Iterator[Launched]:
        """Reduce: yield each collective after its launch."""

    def start(self, step: int | None = None) -> None:
        """Read the tensor and launch the first collective."""
        self._running = self._stages(self._calls if step is None else step)
        self._calls += 1
        self._pending = next(self._running, None)

    def advance(self) -> bool:
        """Wait for the last launched collective and launch the next; False when that was all."""
        if self._running is None:
            raise RuntimeError("nothing was started; call start() first")
        if self._pending is not None:
            self._wires.wait(self._pending)
            self._pending = next(self._running, None)
        return self._pending is not None

    def wait(self) -> None:
        """Advance to the end."""
        while self.advance():
            pass


class Wires:
    """A group's collectives with their bytes counted, and waits under a watcher, where there are such.

    Args:
        group: The ranks; None is the default group.
        meter: Counts bytes as ``replicas`` and seconds.
        watcher: Bounds the waits.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, *, meter: Meter | None = None, watcher: Watcher | None = None
    ) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.meter = meter
        self.watcher = watcher

    def wait(self, launched: Launched) -> None:
        """Wait for a collective."""
        timed: AbstractContextManager[None] = nullcontext()
        if self.meter is not None:
            timed = self.meter.timed("wait_replicas")
        watched: AbstractContextManager[None] = nullcontext()
        if self.watcher is not None:
            watched = self.watcher.waiting(launched.action)
        with timed, watched:
            launched.work.wait()

    def all_reduce(self, tensor: Tensor, action: str) -> Launched:
        """Sum a tensor in place."""
        if self.meter is not None:
            self.meter.all_reduce(REPLICAS, tensor.nbytes, self.ranks)
        return Launched(_started(dist.all_reduce(tensor, group=self.group, async_op=True)), action)

    def all_gather(self, out: Tensor, part: Tensor, action: str) -> Launched:
        """Every rank's part, ``[n]``, into ``out``, ``[ranks * n]``."""
        if self.meter is not None:
            self.meter.all_gather(REPLICAS, part.nbytes, self.ranks)
        return Launched(_started(dist.all_gather_single(out, part, group=self.group, async_op=True)), action)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, action: str) -> Launched:
        """This rank's ``[n]`` of the sum of the ranks' ``[ranks * n]``."""
        if self.meter is not None:
            share = tensor.nbytes * (self.ranks - 1) // self.ranks
            self.meter.count(REPLICAS, sent=share, received=share)
        return Launched(_started(dist.reduce_scatter_single(out, tensor, group=self.group, async_op=True)), action)

    def all_to_all(self, out: Tensor, parts: Tensor, sizes: list[int], action: str) -> Launched:
        """Rank ``r`` gets ``sizes[r]`` elements of ``parts``; ``out`` holds what all ranks sent here, in rank order."""
        mine = sizes[self.rank]
        if self.meter is not None:
            self.meter.count(
                REPLICAS,
                sent=(parts.numel() - mine) * parts.element_size(),
                received=(out.numel() - mine) * out.element_size(),
            )
        work = dist.all_to_all_single(
            out,
            parts,
            output_split_sizes=[mine] * self.ranks,
            input_split_sizes=sizes,
            group=self.group,
            async_op=True,
        )
        return Launched(_started(work), action)


def _started(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise RuntimeError("this process is not in the group of the collective")
    return work
