"""The sending end of a channel."""

import time
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from penstock._core.waiting import Watcher
from penstock.pipe.buffers import Buffer, round_up
from penstock.pipe.capacity import Capacity
from penstock.pipe.frame import Address, Layout, LayoutCache, copy_into, views, write_head
from penstock.pipe.route import TAG_FRAME, TAG_PAYLOAD, TAG_REST, Route
from penstock.pipe.schedule import Channel
from penstock.pipe.value import Structure


class _Slot:
    """One of the sends that may be under way: a frame, ready for another value of the same layout."""

    __slots__ = ("address", "buffer", "layout", "payload", "places", "positions", "works")

    def __init__(self) -> None:
        self.buffer: Buffer | None = None
        self.layout: Layout | None = None
        self.positions = 0
        self.places: list[Tensor] = []
        self.payload: Tensor | None = None
        self.works: list[dist.Work] = []
        self.address: Address | None = None


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
        self._capacity = Capacity()
        self._global_peer = dist.get_global_rank(route.frames, channel.target)
        self._slots = [_Slot() for _ in range(window)]
        self._at = 0

    def begin(self) -> None:
        """A step starts."""
        self._capacity.begin()

    def send(self, address: Address, structure: Structure, tensors: list[Tensor], positions: Sequence[int]) -> None:
        """Send a value; see :meth:`penstock.pipe.transport.Transport.send`."""
        slot = self._slots[self._at]
        self._at = (self._at + 1) % len(self._slots)
        if slot.works:
            self._finish(slot)
        route = self._route
        if route.payload is None:
            apart = [False] * len(tensors)
        else:
            apart = [tensor.device == route.device for tensor in tensors]
        layout = self._layouts.of(structure, tensors, apart)
        header = layout.header(address, positions)
        length = header.frame_bytes
        capacity = self._capacity.take()
        self._capacity.saw(length)
        buffer = slot.buffer
        if buffer is None or buffer.nbytes != max(capacity, round_up(length)):
            buffer = slot.buffer = Buffer(max(capacity, round_up(length)))
            slot.layout = None
        if layout is not slot.layout or slot.positions != len(positions):
            slot.payload = route.empty_payload(header.apart_bytes)
            slot.places = views(buffer.array, slot.payload, header.data_start, layout)
            slot.layout, slot.positions = layout, len(positions)
        write_head(buffer.memory, header, layout.preamble, positions)
        copy_into(slot.places, tensors)
        slot.address = address
        target = self.channel.target
        slot.works = [route.frames.send([buffer.tensor[: min(length, capacity)]], target, TAG_FRAME)]
        if length > capacity:
            slot.works.append(route.frames.send([buffer.tensor[capacity:length]], target, TAG_REST))
        if slot.payload is not None and route.payload is not None:
            slot.works.append(route.payload.send([slot.payload], target, TAG_PAYLOAD))
        self.sent_bytes += length + header.apart_bytes

    def drain(self) -> None:
        """Wait until every send has left."""
        for slot in (*self._slots[self._at :], *self._slots[: self._at]):
            if slot.works:
                self._finish(slot)

    def _finish(self, slot: _Slot) -> None:
        address = slot.address
        assert address is not None
        forward = address.direction == "F"
        start = time.perf_counter()
        with self._watcher.waiting(
            "SEND_F" if forward else "SEND_B",
            stage=address.stage - 1 if forward else address.stage + 1,
            micro_batch=address.micro_batch,
            peer=self._global_peer,
        ):
            for work in slot.works:
                work.wait()
        slot.works = []
        self.waited_s += time.perf_counter() - start
