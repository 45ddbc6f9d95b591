"""The receiving side of a connection: whole frames, read when they are wanted or ahead of that."""

import socket
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Thread
from typing import Final

from penstock.pipe.buffers import Buffer, round_up
from penstock.pipe.frame import HEADER_BYTES, frame_length
from penstock.pipe.outgoing import ConnectionLostError, shut

_EARLY_BYTES: Final = 8192
"""What one look may bring before it is known how long a frame is: short frames take one system call."""

_BRIEF_S: Final = 200e-6
"""A wait up to this long is better spent looking: to be woken costs a sleeper less, but the rank that wakes it as much,
on its way to what others wait for."""

TakeBuffer = Callable[[int], Buffer]
"""Gives a buffer of a number of bytes."""


class _Posted:
    """A frame that the thread is to read."""

    __slots__ = ("buffer", "error", "ready", "take")

    def __init__(self, take: TakeBuffer) -> None:
        self.take = take
        self.ready = Event()
        self.buffer: Buffer | None = None
        self.error: Exception | None = None


class Incoming:
    """Receives frames from one other rank.

    Short frames wait in the kernel's buffer until somebody reads them. Long ones do not fit there, and would only be
    on their way while somebody does: for these a thread reads, into memory of this process, while the rank computes.

    Args:
        connection: A blocking socket; used for receiving by this object alone.
        peer: Who is at its other end, for messages.
        looks: Whether there is a processor to spare for looking out for a frame that is about to come, where the one
            before came within 200 us.
    """

    def __init__(self, connection: socket.socket, peer: str, *, looks: bool = False) -> None:
        self._socket = connection
        self._peer = peer
        self._early = memoryview(bytearray(_EARLY_BYTES))
        self._start = self._end = 0  # of what it holds
        self._posted: deque[_Posted] = deque()
        self._queue: SimpleQueue[_Posted | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._looks = looks
        self._brief = False

    @property
    def ahead(self) -> int:
        """How many frames are being read ahead, or have been."""
        return len(self._posted)

    def post(self, take: TakeBuffer) -> None:
        """Have the next frame read without being waited for."""
        if self._thread is None:
            self._thread = Thread(target=self._work, name="penstock-receive", daemon=True)
            self._thread.start()
        posted = _Posted(take)
        self._posted.append(posted)
        self._queue.put(posted)

    def receive(self, take: TakeBuffer) -> Buffer:
        """The next frame, at the start of a buffer.

        Raises:
            ConnectionLostError: The other side is gone.
            FrameError: What arrives is no frame.
        """
        if not self._posted:
            return self._read(take, looks=self._looks)
        posted = self._posted.popleft()
        posted.ready.wait()
        if posted.error is not None:
            raise posted.error
        assert posted.buffer is not None
        return posted.buffer

    def close(self) -> None:
        """Close the connection; whoever waits for a frame is told."""
        shut(self._socket)
        self._queue.put(None)

    def leave(self) -> None:
        """Let go of the connection without closing it: it is another process's."""
        self._socket.close()

    def _work(self) -> None:
        while (posted := self._queue.get()) is not None:
            try:
                posted.buffer = self._read(posted.take)
            except Exception as error:  # whoever waits for the frame raises it
                posted.error = error
            posted.ready.set()

    def _read(self, take: TakeBuffer, *, looks: bool = False) -> Buffer:
        early, start, end = self._early, self._start, self._end
        if end - start < HEADER_BYTES:
            early[: end - start] = early[start:end]
            start, end = 0, end - start
            if looks:
                end += self._look(early[end:])
            while end < HEADER_BYTES:
                end += self._some(early[end:])
        length = frame_length(early[start : start + HEADER_BYTES])
        buffer = take(round_up(length))
        here = min(length, end - start)
        buffer.memory[:here] = early[start : start + here]
        self._start, self._end = start + here, end
        rest = buffer.memory[here:length]
        while rest:
            rest = rest[self._some(rest, socket.MSG_WAITALL) :]
        return buffer

    def _look(self, memory: memoryview) -> int:
        """Receive at least one byte, without sleeping if waits have been brief; returns how many."""
        start = time.perf_counter()
        while self._brief:
            try:
                return self._some(memory, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._brief = time.perf_counter() - start < _BRIEF_S
        got = self._some(memory)
        self._brief = time.perf_counter() - start < _BRIEF_S
        return got

    def _some(self, memory: memoryview, flags: int = 0) -> int:
        """Receive at least one byte; returns how many.

        Raises:
            BlockingIOError: None is there yet, and the flags say not to wait.
            ConnectionLostError: The other side is gone.
        """
        try:
            got = self._socket.recv_into(memory, flags=flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConnectionLostError(f"Connection to {self._peer} is lost: {error.strerror or error}") from error
        if not got:
            raise ConnectionLostError(f"Connection closed by peer {self._peer}")
        return got
