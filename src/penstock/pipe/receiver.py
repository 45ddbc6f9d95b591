"""The receiving end of a channel."""

import time
from typing import Final, NamedTuple

from torch import Tensor

from penstock._core.waiting import Watcher
from penstock.pipe.buffers import BufferPool
from penstock.pipe.frame import Address, Header, LayoutCache, read_layout, read_positions, views
from penstock.pipe.incoming import Incoming
from penstock.pipe.route import Route
from penstock.pipe.schedule import Channel
from penstock.pipe.value import Structure

_AHEAD: Final = 2
"""Long frames read before they are needed."""
_LONG: Final = 32 * 1024
"""Bytes from which a frame is read ahead. Shorter ones fit the kernel's buffers, a few of them, and reading one there
takes less than waking a thread."""


class Received(NamedTuple):
    """A value as it arrived.

    Attributes:
        structure: See :mod:`penstock.pipe.value`.
        tensors: In the structure's order; they look into a pooled buffer, and may be changed freely.
        requires_grad: For each tensor, whether the sender wants its gradient.
        positions: The sample positions that came with it.
    """

    structure: Structure
    tensors: list[Tensor]
    requires_grad: tuple[bool, ...]
    positions: tuple[int, ...]


class Receiver:
    """Receives values from one other rank, in order.

    Attributes:
        channel: Where from.
        received_bytes: Since it was last set to 0.
        waited_s: Seconds spent waiting for values, likewise.
    """

    def __init__(self, channel: Channel, route: Route, layouts: LayoutCache, watcher: Watcher) -> None:
        self.channel = channel
        self.received_bytes = 0
        self.waited_s = 0.0
        self._route = route
        self._layouts = layouts
        self._watcher = watcher
        self._action = "RECV_F" if channel.direction == "F" else "RECV_B"
        self._peer = route.ranks[channel.source]
        self._pool = BufferPool()
        self._incoming: Incoming = route.incoming(channel.source)
        self._to_come = 0
        self._long = False

    def begin(self, count: int) -> None:
        """A step starts in which ``count`` messages come."""
        self._to_come = count
        self.read_ahead()

    def receive(self, address: Address) -> Received:
        """Wait for the next value; see :meth:`penstock.pipe.transport.Transport.receive`."""
        start = time.perf_counter()
        with self._watcher.waiting(self._action, stage=address.stage, micro_batch=address.micro_batch, peer=self._peer):
            buffer = self._incoming.receive(self._pool.take)
            header = Header.read(buffer.memory, address)
            payload = self._route.empty_payload(header.apart_bytes)
            if payload is not None and self._route.payload is not None:
                self._route.payload.recv([payload], self.channel.source, 0).wait()
        self.waited_s += time.perf_counter() - start
        length = header.frame_bytes
        self.received_bytes += length + header.apart_bytes
        self._to_come -= 1
        self._long = length >= _LONG
        layout = read_layout(buffer.memory, header, self._layouts)
        positions = read_positions(buffer.memory, header)
        tensors = views(self._pool.lend(buffer), payload, header.data_start, layout)
        return Received(layout.structure, tensors, layout.requires_grad, positions)

    def read_ahead(self) -> None:
        """Have long frames read while this rank computes; called when there is time, after others have been served."""
        incoming = self._incoming
        while self._long and incoming.ahead < min(_AHEAD, self._to_come):
            incoming.post(self._pool.take)
