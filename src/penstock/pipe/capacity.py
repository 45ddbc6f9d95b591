"""How long the first message of a frame may be: the same function of the same history on both ends of a channel.

A receiver must post a buffer before it knows how long the message is, and a message longer than the buffer is fatal on
gloo. So both ends keep the same *capacity*: the longest frame of late, rounded up to a power of two. A longer frame is
cut: its first ``capacity`` bytes go in the message, its header announces the whole length, and the rest follows in a
second message. Receives are posted ``AHEAD`` messages early, so the capacity of message ``i`` depends on messages up to
``i - AHEAD`` only, which both ends have seen by then. Steady shapes thus cost one message, and no handshake is needed.
"""

from collections import deque
from typing import Final

from penstock.pipe.buffers import round_up

AHEAD: Final = 2
"""Receives posted before their messages are needed."""
EPOCH: Final = 64
"""A frame counts for this many further ones at least, and twice as many at most: then the capacity may shrink."""


class Capacity:
    """The capacities of a channel's messages, one after the other."""

    def __init__(self) -> None:
        self._longest = 1
        self._seen = 0
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
        if frame_bytes > self._longest:
            self._longest = frame_bytes
            self._now = max(self._now, round_up(frame_bytes))
        self._next.append(self._now)
        self._seen += 1
        if self._seen == EPOCH:
            self._now = round_up(self._longest)
            self._longest, self._seen = 1, 0
