"""Sums of a few numbers over all ranks, once all of them prove to be doing the same thing.

They go by the connections that values between stages go by, in two rounds::

    1. along each pipeline                  2. between the pipelines, for each place in them

       first stage   o---+  ^                  pipeline 0  o     what the ranks of each pipeline were told
                     o---+  |                             / \\    is added up over a tree, and told again
       last stage    o<--+--+                          1 o   o 2

In the first, all send to the rank with the last stage, when they have run their last forward pass. Each of these leads
to a pass there, so it finds what they sent when it has run its own, and answers at once: a rank that is done before
the others of its pipeline need not wait for them. The second takes place when the sum is waited for. It is between
ranks at the same place of their pipelines, which the exchange of gradients makes wait for each other anyway.

Each rank adds up the same numbers in the same order in float64, so every rank is told the same bits.
"""

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

from penstock._core.counted import counted
from penstock._core.meter import CONTROL, Meter
from penstock._core.waiting import Watcher
from penstock.pipe.buffers import BufferPool
from penstock.pipe.connections import Connections
from penstock.pipe.frame import HEADER_BYTES, Address, FrameError, Header, write_head
from penstock.pipe.groups import PipeGroups

_DIRECTION: Final = "S"
_ADDRESS: Final = Address(_DIRECTION, 0, 0, 0)
"""Of all these frames: what they belong to is said inside, where a difference can be told to every rank."""


class _Said(NamedTuple):
    """What a rank says for itself and those it speaks for.

    Attributes:
        rank: In the world.
        doing: In words.
        numbers: Added up so far.
        problem: Who does something else; empty if nobody is known to.
    """

    rank: int
    doing: str
    numbers: list[float]
    problem: str = ""

    def plus(self, other: "_Said") -> "_Said":
        """Both together."""
        problem = self.problem or other.problem
        if not problem and other.doing != self.doing:
            problem = f"rank {other.rank} is {other.doing}, but rank {self.rank} is {self.doing}"
        if problem:
            return self._replace(numbers=[], problem=problem)
        return self._replace(numbers=[a + b for a, b in zip(self.numbers, other.numbers, strict=True)])


class _Tree:
    """This rank's place in a tree of ranks that add up.

    Args:
        parent: Whom it tells what it and its children say; None for the root.
        children: Who tells it.
        connections: May be None where there is neither.
        watcher: Told of the waits.
        meter: Counts the bytes (``control``) and the waits (``wait_loss``).
    """

    def __init__(
        self,
        parent: int | None,
        children: Sequence[int],
        connections: Connections | None,
        watcher: Watcher,
        meter: Meter,
    ) -> None:
        self.parent = parent
        self._children = children
        self._connections = connections
        self._watcher = watcher
        self._meter = meter
        self._pool = BufferPool()

    def up(self, said: _Said, name: str) -> _Said:
        """Add what the children say, and tell the parent."""
        for child in self._children:
            said = said.plus(self._receive(child, name))
        if self.parent is not None:
            self._send(said, self.parent, name)
        return said

    def down(self, said: _Said, name: str) -> _Said:
        """Learn what it all came to, and tell the children."""
        if self.parent is not None:
            said = self._receive(self.parent, name)
        for child in self._children:
            self._send(said, child, name)
        return said

    def _send(self, said: _Said, peer: int, name: str) -> None:
        assert self._connections is not None
        text = json.dumps(said).encode()
        header = Header(_ADDRESS, 0, len(text), 0, 0)
        frame = memoryview(bytearray(header.frame_bytes))
        write_head(frame, header, text, ())
        with self._watcher.waiting(name, peer=peer):
            self._connections.outgoing(peer, _DIRECTION).send(frame)
        self._meter.count(CONTROL, sent=len(frame))

    def _receive(self, peer: int, name: str) -> _Said:
        assert self._connections is not None
        with self._meter.timed("wait_loss"), self._watcher.waiting(name, peer=peer):
            buffer = self._connections.incoming(peer, _DIRECTION).receive(self._pool.take)
        header = Header.read(buffer.memory, _ADDRESS)
        try:
            said = _Said(*json.loads(bytes(buffer.memory[HEADER_BYTES : HEADER_BYTES + header.preamble_bytes])))
        except (ValueError, TypeError) as error:
            raise FrameError(f"what rank {peer} says of the {name} arrived damaged ({error})") from error
        self._pool.give(buffer)
        self._meter.count(CONTROL, received=header.frame_bytes)
        return said


class CommonSum:
    """A sum over all ranks under way; made by :meth:`CommonSums.start`."""

    def __init__(self, said: _Said, name: str, along: _Tree, between: _Tree) -> None:
        self._name = name
        self._along = along
        self._between = between
        self._said = along.up(said, name)
        if along.parent is None:
            self._said = along.down(self._said, name)

    def wait(self) -> list[float]:
        """The sums, in the order of the numbers.

        Raises:
            ValueError: Not all ranks do the same; it names two that do not, on every rank.
            WaitError: A rank is gone.
        """
        along, between, name = self._along, self._between, self._name
        said = self._said if along.parent is None else along.down(self._said, name)
        said = between.down(between.up(said, name), name)
        if said.problem:
            raise ValueError(
                f"not all ranks do the same: {said.problem}; "
                "every rank must call train_batch and eval_batch in the same order"
            )
        return said.numbers


class CommonSums:
    """Adds up numbers over all ranks of a topology, one sum at a time.

    Args:
        groups: The ranks and their connections.
        last: Pipeline rank that holds the last stage.
        watcher: Told of the waits.
        meter: Counts the bytes (``control``) and the waits (``wait_loss``).
    """

    def __init__(self, groups: PipeGroups, last: int, *, watcher: Watcher, meter: Meter) -> None:
        self._rank = groups.rank
        pipeline, place = groups.pipeline_ranks, groups.pipe_rank
        others = [rank for rank in pipeline if rank != pipeline[last]] if place == last else []
        parent = None if place == last else pipeline[last]
        self._along = _Tree(parent, others, groups.connections, watcher, meter)
        alike = groups.topology.filter_match(pipe=place)
        at = alike.index(self._rank)
        parent = alike[(at - 1) // 2] if at else None
        self._between = _Tree(parent, alike[2 * at + 1 : 2 * at + 3], groups.connections, watcher, meter)

    def start(self, numbers: Sequence[float], name: str, *, step: int, training: bool) -> CommonSum:
        """Say what this rank adds; every rank calls it.

        Args:
            numbers: As many on each rank; whole numbers are exact up to 2**53.
            name: Of the sum, for messages.
            step: Optimizer step.
            training: Whether this rank trains or evaluates.

        Raises:
            WaitError: A rank is gone.
        """
        doing = f"{'train' if training else 'evaluat'}ing at step {step}"
        doing += f" ({name}: {counted(len(numbers), 'number', 'numbers')})"
        return CommonSum(_Said(self._rank, doing, [float(n) for n in numbers]), name, self._along, self._between)
