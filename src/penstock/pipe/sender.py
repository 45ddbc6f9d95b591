"""The sending end of a channel."""

import time
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from penstock._core.waiting import Wait, Watcher
from penstock.pipe.buffers import Buffer, round_up
from penstock.pipe.frame import Address, Layout, LayoutCache, copy_into, views, write_head
from penstock.pipe.outgoing import ConnectionLostError, Pending
from penstock.pipe.route import Route
from penstock.pipe.schedule import Channel
from penstock.pipe.value import Structure


class _Slot:
    """One of the sends that may be under way: a frame, ready for another value of the same layout."""

    __slots__ = ("address", "buffer", "layout", "payload", "pending", "places", "positions", "work")

    def __init__(self) -> None:
        self.buffer: Buffer | None = None
        self.layout: Layout | None = None
        self.positions = 0
        self.places: list[Tensor] = []
        self.payload: Tensor | None = None
        self.pending: Pending | None = None
        self.work: dist.Work | None = None
        self.address: Address | None = None

    @property
    def under_way(self) -> bool:
        """Whether something of it has yet to leave."""
        return self.pending is not None or self.work is not None


class Sender:
    """Sends values to one other rank, in order.

    Attributes:
        channel: Where to.
        sent_bytes: Since it was last set to 0.
        waited_s: Seconds spent waiting for room, likewise.
    """

    def __init__(self, channel: Channel, route: Route, layouts: LayoutCache, watcher: Watcher, window: int) -> None:
        self.channel = channel
        self.sent_bytes = 0
        self.waited_s = 0.0
        self._route = route
        self._layouts = layouts
        self._watcher = watcher
        self._outgoing = route.outgoing(channel.target)
        self._slots = [_Slot() for _ in range(window)]
        self._at = 0

    def send(self, address: Address, structure: Structure, tensors: list[Tensor], positions: Sequence[int]) -> None:
        """Send a value; see :meth:`penstock.pipe.transport.Transport.send`."""
        slot = self._slots[self._at]
        if slot.under_way:
            # A slot whose frame left at once is still in the cache, and taken again; any other has its turn last.
            self._at = (self._at + 1) % len(self._slots)
            slot = self._slots[self._at]
            if slot.under_way:
                self._finish(slot)
        route = self._route
        if route.payload is None:
            apart = [False] * len(tensors)
        else:
            apart = [tensor.device == route.device for tensor in tensors]
        layout = self._layouts.of(structure, tensors, apart)
        header = layout.header(address, positions)
        length = header.frame_bytes
        buffer = slot.buffer
        if buffer is None or buffer.nbytes != round_up(length):
            buffer = slot.buffer = Buffer(round_up(length))
            slot.layout = None
        if layout is not slot.layout or slot.positions != len(positions):
            slot.payload = route.empty_payload(header.apart_bytes)
            slot.places = views(buffer.array, slot.payload, header.data_start, layout)
            slot.layout, slot.positions = layout, len(positions)
        write_head(buffer.memory, header, layout.preamble, positions)
        copy_into(slot.places, tensors)
        slot.address = address
        try:
            slot.pending = self._outgoing.send(buffer.memory[:length])
        except ConnectionLostError:
            with self._waiting(address):
                raise
        if slot.payload is not None and route.payload is not None:
            slot.work = route.payload.send([slot.payload], self.channel.target, 0)
        self.sent_bytes += length + header.apart_bytes

    def drain(self) -> None:
        """Wait until every send has left."""
        for slot in (*self._slots[self._at + 1 :], *self._slots[: self._at + 1]):
            if slot.under_way:
                self._finish(slot)

    def _finish(self, slot: _Slot) -> None:
        assert slot.address is not None
        start = time.perf_counter()
        with self._waiting(slot.address):
            if slot.pending is not None:
                slot.pending.wait()
            if slot.work is not None:
                slot.work.wait()
        slot.pending = slot.work = None
        self.waited_s += time.perf_counter() - start

    def _waiting(self, address: Address) -> Wait:
        forward = address.direction == "F"
        return self._watcher.waiting(
            "SEND_F" if forward else "SEND_B",
            stage=address.stage - 1 if forward else address.stage + 1,
            micro_batch=address.micro_batch,
            peer=self._route.ranks[self.channel.target],
        )
