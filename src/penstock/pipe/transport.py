"""Moves stage values and their gradients between neighbouring pipeline ranks.

One message per hop: a second one would double the latency. The receiver must post a buffer before it knows how long
the message is, and a message longer than the buffer is fatal on gloo, so both ends keep the same *capacity*: the
longest message so far on that channel, rounded up to a power of two. A longer frame is cut: its first ``capacity``
bytes go in the message, its header announces the whole length, and the rest follows in a second message. Receives are
posted ``AHEAD`` messages early, so the capacity of message ``i`` may depend on messages up to ``i - AHEAD`` only,
which both ends have seen by then. Steady shapes thus cost one message, and no handshake is ever needed.

Sends are not waited for where they are made: up to ``window`` of them are under way per channel.

Where tensors live on a GPU, a frame carries everything but them, over gloo, so nothing is read back from the device to
learn a size; the tensors follow as one payload over NCCL.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import ACTIVATIONS, Meter
from penstock._core.waiting import Watcher
from penstock.pipe.buffers import BufferPool, round_up
from penstock.pipe.frame import (
    Address,
    Header,
    Layout,
    LayoutCache,
    read_layout,
    read_positions,
    views,
    write_frame,
)
from penstock.pipe.schedule import Channel
from penstock.pipe.value import Structure

AHEAD: Final = 2
"""Receives posted before their messages are needed."""

# What is left of a long frame has a tag of its own: receives for the frames after it are posted already.
_TAG_FRAME: Final = 0
_TAG_REST: Final = 1
_TAG_PAYLOAD: Final = 2


class Route(NamedTuple):
    """The process groups that one direction uses.

    Attributes:
        frames: For frames: gloo.
        payload: For tensors on ``device``; None sends them inside the frames.
        device: Where payloads live.
    """

    frames: dist.ProcessGroup
    payload: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")


class Received(NamedTuple):
    """A value as it arrived.

    Attributes:
        structure: See :mod:`penstock.pipe.value`.
        tensors: In the structure's order; views into a pooled buffer, to be changed freely.
        requires_grad: For each tensor, whether the sender wants its gradient.
        positions: The sample positions that came with it.
    """

    structure: Structure
    tensors: list[Tensor]
    requires_grad: tuple[bool, ...]
    positions: tuple[int, ...]


class Transport:
    """One rank's channels to its neighbours in the pipeline.

    Args:
        rank: This pipeline rank; it and the ranks of the channels are ranks of the routes' groups.
        routes: By direction, ``"F"`` and ``"B"``. Each has groups of its own, so that neither blocks the other.
        watcher: Told of every blocking wait.
        meter: Counts the bytes (``activations``) and the waits (``wait_forward``, ``wait_backward``, ``wait_send``).
        window: How many sends may be under way per channel.
    """

    def __init__(
        self, rank: int, routes: Mapping[str, Route], *, watcher: Watcher, meter: Meter, window: int = 8
    ) -> None:
        if window < 1:
            raise ValueError(f"at least one send must be allowed under way, got window={window}")
        self.rank = rank
        self._routes = routes
        self._watcher = watcher
        self._meter = meter
        self._window = window
        self._layouts = LayoutCache()
        self._senders: dict[Channel, _Sender] = {}
        self._receivers: dict[Channel, _Receiver] = {}

    def begin(self, messages: Mapping[Channel, int]) -> None:
        """Post the first receives of a step.

        Args:
            messages: How many messages each channel of this rank carries in this step, in and out.
        """
        for channel, count in messages.items():
            if channel.source == self.rank:
                if channel not in self._senders:
                    self._senders[channel] = _Sender(channel, self._routes[channel.direction], self._window)
                self._senders[channel].capacity.begin()
            else:
                if channel not in self._receivers:
                    self._receivers[channel] = _Receiver(channel, self._routes[channel.direction])
                self._receivers[channel].begin(count)

    def send(
        self,
        channel: Channel,
        address: Address,
        structure: Structure,
        tensors: list[Tensor],
        positions: Sequence[int] = (),
    ) -> None:
        """Send a value; returns once it is copied, not when it has arrived.

        Args:
            channel: One of those named in :meth:`begin`.
            address: What it is, for which stage.
            structure: From :func:`penstock.pipe.value.flatten`, as are the tensors.
            tensors: Contiguous or not, of any shape; they are free to change afterwards.
            positions: Sample positions to go with it.
        """
        sender = self._senders[channel]
        while len(sender.under_way) >= self._window:
            self._finish_oldest(sender)
        device = sender.route.device
        apart = [sender.route.payload is not None and tensor.device == device for tensor in tensors]
        layout = self._layouts.of(structure, tensors, apart)
        header = layout.header(address, positions)
        with torch.no_grad():
            sender.start(address, header, layout, positions, tensors)
        self._meter.count(ACTIVATIONS, sent=header.frame_bytes + header.apart_bytes)

    def receive(self, channel: Channel, address: Address) -> Received:
        """Wait for the next value of a channel.

        Raises:
            FrameError: It is not the one expected, or damaged.
            WaitError: The peer is gone.
        """
        receiver = self._receivers[channel]
        forward = channel.direction == "F"
        start = time.perf_counter()
        with (
            self._watcher.waiting(
                "RECV_F" if forward else "RECV_B",
                stage=address.stage,
                micro_batch=address.micro_batch,
                peer=receiver.global_peer,
            ),
            torch.no_grad(),
        ):
            header, frame, payload = receiver.next(address)
        self._meter.add_seconds("wait_forward" if forward else "wait_backward", time.perf_counter() - start)
        self._meter.count(ACTIVATIONS, received=header.frame_bytes + header.apart_bytes)
        layout = read_layout(frame, header, self._layouts)
        with torch.no_grad():
            tensors = views(frame, payload, header.data_start, layout)
        return Received(layout.structure, tensors, layout.requires_grad, read_positions(frame, header))

    def drain(self) -> None:
        """Wait until every send has left."""
        for sender in self._senders.values():
            while sender.under_way:
                self._finish_oldest(sender)

    def _finish_oldest(self, sender: "_Sender") -> None:
        sent = sender.under_way.popleft()
        with (
            self._meter.timed("wait_send"),
            self._watcher.waiting(
                "SEND_F" if sender.channel.direction == "F" else "SEND_B",
                stage=sent.address.stage - 1 if sent.address.direction == "F" else sent.address.stage + 1,
                micro_batch=sent.address.micro_batch,
                peer=sender.global_peer,
            ),
        ):
            for work in sent.works:
                work.wait()


class _Capacity:
    """The length of the first message of a frame: the same function of the same history on both ends."""

    def __init__(self) -> None:
        self._now = round_up(1)
        self._next: deque[int] = deque()

    def begin(self) -> None:
        """A step starts: nothing is under way, so its first messages may depend on all before."""
        self._next = deque([self._now] * AHEAD)

    def take(self) -> int:
        """For the next message."""
        return self._next.popleft()

    def saw(self, frame_bytes: int) -> None:
        """Note the length of a frame, in order."""
        self._now = max(self._now, round_up(frame_bytes))
        self._next.append(self._now)


class _UnderWay(NamedTuple):
    address: Address
    works: list[dist.Work]
    tensors: list[Tensor]
    """Kept until the sends are done; then their buffers go back to the pool."""


class _Sender:
    """This rank's end of a channel to another rank."""

    def __init__(self, channel: Channel, route: Route, window: int) -> None:
        self.channel = channel
        self.route = route
        self.capacity = _Capacity()
        self.under_way: deque[_UnderWay] = deque()
        self.global_peer = dist.get_global_rank(route.frames, channel.target)
        self._pool = BufferPool()

    def start(
        self, address: Address, header: Header, layout: Layout, positions: Sequence[int], tensors: list[Tensor]
    ) -> None:
        """Copy the value into a buffer and start its messages."""
        length = header.frame_bytes
        frame = self._pool.take(length)
        payload = _empty_payload(header, self.route)
        write_frame(frame, payload, header, layout, positions, tensors)
        capacity = self.capacity.take()
        self.capacity.saw(length)
        works = [self._send(frame[: min(length, capacity)], self.route.frames, _TAG_FRAME)]
        if length > capacity:
            works.append(self._send(frame[capacity:length], self.route.frames, _TAG_REST))
        kept = [frame]
        if payload is not None and self.route.payload is not None:
            works.append(self._send(payload, self.route.payload, _TAG_PAYLOAD))
            kept.append(payload)
        self.under_way.append(_UnderWay(address, works, kept))

    def _send(self, message: Tensor, group: dist.ProcessGroup, tag: int) -> dist.Work:
        work = dist.isend(message, group=group, tag=tag, group_dst=self.channel.target)
        assert work is not None
        return work


class _Receiver:
    """This rank's end of a channel from another rank."""

    def __init__(self, channel: Channel, route: Route) -> None:
        self.channel = channel
        self.route = route
        self.global_peer = dist.get_global_rank(route.frames, channel.source)
        self._capacity = _Capacity()
        self._pool = BufferPool()
        self._posted: deque[tuple[dist.Work, Tensor, int]] = deque()
        self._to_post = 0

    def begin(self, count: int) -> None:
        """A step starts in which ``count`` messages come."""
        self._to_post = count
        self._capacity.begin()
        for _ in range(AHEAD):
            self._post()

    def next(self, address: Address) -> tuple[Header, Tensor, Tensor | None]:
        """Wait for the next message, and for what did not fit and what travels apart."""
        work, frame, capacity = self._posted.popleft()
        work.wait()
        header = Header.read(frame.numpy().data, address)
        length = header.frame_bytes
        self._capacity.saw(length)
        if length > capacity:
            whole = self._pool.take(length)
            self._recv(whole[capacity:length], self.route.frames, _TAG_REST).wait()
            whole[:capacity] = frame[:capacity]
            frame = whole
        self._post()
        payload = _empty_payload(header, self.route)
        if payload is not None and self.route.payload is not None:
            self._recv(payload, self.route.payload, _TAG_PAYLOAD).wait()
        return header, frame, payload

    def _post(self) -> None:
        if self._to_post == 0:
            return
        self._to_post -= 1
        capacity = self._capacity.take()
        frame = self._pool.take(capacity)
        self._posted.append((self._recv(frame[:capacity], self.route.frames, _TAG_FRAME), frame, capacity))

    def _recv(self, message: Tensor, group: dist.ProcessGroup, tag: int) -> dist.Work:
        work = dist.irecv(message, group=group, tag=tag, group_src=self.channel.source)
        assert work is not None
        return work


def _empty_payload(header: Header, route: Route) -> Tensor | None:
    if not header.apart_bytes:
        return None
    return torch.empty(header.apart_bytes, dtype=torch.uint8, device=route.device)
