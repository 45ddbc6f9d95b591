"""The receiving end of a channel."""

import time
from collections import deque
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from penstock._core.waiting import Watcher
from penstock.pipe.buffers import Buffer, BufferPool, round_up
from penstock.pipe.capacity import AHEAD, Capacity
from penstock.pipe.frame import Address, Header, LayoutCache, read_layout, read_positions, views
from penstock.pipe.route import TAG_FRAME, TAG_PAYLOAD, TAG_REST, Route
from penstock.pipe.schedule import Channel
from penstock.pipe.value import Structure


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


class _Posted(NamedTuple):
    """A receive under way."""

    work: dist.Work
    buffer: Buffer
    capacity: int


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
        self._capacity = Capacity()
        self._global_peer = dist.get_global_rank(route.frames, channel.source)
        self._pool = BufferPool()
        self._posted: deque[_Posted] = deque()
        self._to_post = 0

    def begin(self, count: int) -> None:
        """A step starts in which ``count`` messages come."""
        self._to_post = count
        self._capacity.begin()
        for _ in range(AHEAD):
            self.post_next()

    def receive(self, address: Address) -> Received:
        """Wait for the next value; see :meth:`penstock.pipe.transport.Transport.receive`."""
        start = time.perf_counter()
        with self._watcher.waiting(
            self._action, stage=address.stage, micro_batch=address.micro_batch, peer=self._global_peer
        ):
            work, buffer, capacity = self._posted.popleft()
            work.wait()
            header = Header.read(buffer.memory, address)
            length = header.frame_bytes
            self._capacity.saw(length)
            if length > capacity:
                buffer = self._whole(buffer, capacity, length)
            payload = self._route.empty_payload(header.apart_bytes)
            if payload is not None and self._route.payload is not None:
                self._route.payload.recv([payload], self.channel.source, TAG_PAYLOAD).wait()
        self.waited_s += time.perf_counter() - start
        self.received_bytes += length + header.apart_bytes
        if not self._posted:
            self.post_next()
        layout = read_layout(buffer.memory, header, self._layouts)
        positions = read_positions(buffer.memory, header)
        tensors = views(self._pool.lend(buffer), payload, header.data_start, layout)
        return Received(layout.structure, tensors, layout.requires_grad, positions)

    def _whole(self, first: Buffer, capacity: int, length: int) -> Buffer:
        """A frame of which only the first part fitted the buffer."""
        whole = Buffer(round_up(length))
        rest = self._route.frames.recv([whole.tensor[capacity:length]], self.channel.source, TAG_REST)
        rest.wait()
        whole.memory[:capacity] = first.memory[:capacity]
        self._pool.give(first)
        return whole

    def post_next(self) -> None:
        """Post one receive more, unless enough are under way.

        Called when there is time: after the rank has sent what others wait for.
        """
        if self._to_post == 0 or len(self._posted) >= AHEAD:
            return
        self._to_post -= 1
        capacity = self._capacity.take()
        buffer = self._pool.take(capacity)
        work = self._route.frames.recv([buffer.tensor], self.channel.source, TAG_FRAME)
        self._posted.append(_Posted(work, buffer, capacity))
