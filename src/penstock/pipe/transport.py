"""Moves stage values and their gradients between neighbouring pipeline ranks.

One message per hop: a second one would double the latency. :mod:`penstock.pipe.sender` and
:mod:`penstock.pipe.receiver` are the two ends of a channel, :mod:`penstock.pipe.frame` says what a message looks like
and :mod:`penstock.pipe.connections` by what it travels.

Sends are not waited for where they are made: up to ``window`` of them are under way per channel. Long messages arrive
while this rank computes.

Where tensors live on a GPU, a frame carries everything but them, so nothing is read back from the device to learn a
size; the tensors follow as one payload over NCCL.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from penstock._core.meter import ACTIVATIONS, Meter
from penstock._core.waiting import Watcher
from penstock.pipe.codec import Codec, decode_value, encode_value
from penstock.pipe.frame import Address, LayoutCache
from penstock.pipe.receiver import Received, Receiver
from penstock.pipe.route import Route
from penstock.pipe.schedule import Channel
from penstock.pipe.sender import Sender
from penstock.pipe.value import Structure


class Transport:
    """One rank's channels to its neighbours in the pipeline.

    Args:
        rank: This pipeline rank, as are those of the channels.
        routes: By direction, ``"F"`` and ``"B"``, so that neither blocks the other.
        watcher: Told of every blocking wait.
        meter: Counts the bytes (``activations``) and the waits (``wait_forward``, ``wait_backward``, ``wait_send``).
        window: How many sends may be under way per channel.
        codecs: By direction, what encodes values; the same on every rank. A direction without one sends them as they
            are.
    """

    def __init__(
        self,
        rank: int,
        routes: Mapping[str, Route],
        *,
        watcher: Watcher,
        meter: Meter,
        window: int = 8,
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"at least one send must be allowed under way, got window={window}")
        self.rank = rank
        self._routes = routes
        self._watcher = watcher
        self._meter = meter
        self._window = window
        self._codecs = dict(codecs or {})
        self._layouts = LayoutCache()
        self._senders: dict[Channel, Sender] = {}
        self._receivers: dict[Channel, Receiver] = {}

    def begin(self, messages: Mapping[Channel, int]) -> None:
        """A step starts; connect to those that it is the first to talk with.

        Args:
            messages: How many messages each channel of this rank carries in this step, in and out.

        Raises:
            WaitError: A neighbour cannot be reached.
        """
        # First all connections from here, then those to here: waiting in another order could close a circle.
        for channel in messages:
            if channel.source == self.rank and channel not in self._senders:
                route = self._routes[channel.direction]
                self._senders[channel] = Sender(channel, route, self._layouts, self._watcher, self._window)
        for channel, count in messages.items():
            if channel.source != self.rank:
                if channel not in self._receivers:
                    route = self._routes[channel.direction]
                    self._receivers[channel] = Receiver(channel, route, self._layouts, self._watcher)
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
        codec = self._codecs.get(channel.direction)
        if codec is not None:
            structure, tensors, spared = encode_value(codec, structure, tensors, all_floats=channel.direction == "B")
            self._meter.spare(ACTIVATIONS, sent=spared)
        self._senders[channel].send(address, structure, tensors, positions)
        for receiver in self._receivers.values():
            receiver.read_ahead()

    def receive(self, channel: Channel, address: Address) -> Received:
        """Wait for the next value of a channel.

        Raises:
            FrameError: It is not the one expected, or damaged.
            WaitError: The peer is gone.
        """
        arrived = self._receivers[channel].receive(address)
        codec = self._codecs.get(channel.direction)
        if codec is None:
            return arrived
        structure, tensors, wants, spared = decode_value(
            codec, arrived.structure, arrived.tensors, arrived.requires_grad
        )
        self._meter.spare(ACTIVATIONS, received=spared)
        return Received(structure, tensors, wants, arrived.positions)

    def drain(self) -> None:
        """Wait until every send has left, and enter bytes and waits in the meter."""
        for sender in self._senders.values():
            sender.drain()
            self._meter.count(ACTIVATIONS, sent=sender.sent_bytes)
            if sender.waited_s:
                self._meter.add_seconds("wait_send", sender.waited_s)
            sender.sent_bytes, sender.waited_s = 0, 0.0
        for receiver in self._receivers.values():
            self._meter.count(ACTIVATIONS, received=receiver.received_bytes)
            activity = "wait_forward" if receiver.channel.direction == "F" else "wait_backward"
            self._meter.add_seconds(activity, receiver.waited_s)
            receiver.received_bytes, receiver.waited_s = 0, 0.0
