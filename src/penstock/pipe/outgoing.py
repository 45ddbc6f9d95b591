"""The sending side of a connection: bytes leave at once, or by themselves."""

import contextlib
import socket
from queue import SimpleQueue
from threading import Event, Thread


class ConnectionLostError(RuntimeError):
    """A connection to another rank is gone."""


def shut(connection: socket.socket) -> None:
    """Close a socket; whoever waits on it wakes."""
    with contextlib.suppress(OSError):  # it may not be connected, or not any more
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class Pending:
    """Bytes that the kernel had no room for; they must stay as they are until they have left."""

    __slots__ = ("_left", "_outgoing", "memory")

    def __init__(self, outgoing: "Outgoing", memory: memoryview) -> None:
        self.memory = memory
        self._outgoing = outgoing
        self._left = Event()

    def wait(self) -> None:
        """Until they have left.

        Raises:
            ConnectionLostError: They never will.
        """
        self._left.wait()
        self._outgoing.check()

    @property
    def left(self) -> bool:
        """Whether they have, or never will."""
        return self._left.is_set()

    def done(self) -> None:
        """Say so."""
        self._left.set()


class Outgoing:
    """Sends to one other rank.

    What the kernel takes is gone when :meth:`send` returns: one system call, no other thread. The rest, of messages
    longer than the socket's buffer or on a network slower than their making, goes by a thread, so that it leaves while
    this rank computes.

    Args:
        connection: A blocking socket; used for sending by this object alone.
        peer: Whom it leads to, for messages.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._socket = connection
        self._peer = peer
        self._last: Pending | None = None
        self._queue: SimpleQueue[Pending | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._error: OSError | None = None

    def send(self, memory: memoryview) -> Pending | None:
        """Send bytes after all that were sent before.

        Returns:
            None if the bytes are free to change; else what says when they are.

        Raises:
            ConnectionLostError: The other side is gone.
        """
        last = self._last
        if last is None or last.left:
            self.check()
            try:
                sent = self._socket.send(memory, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._error = error
                self.check()
            if sent == len(memory):
                return None
            memory = memory[sent:]
        pending = self._last = Pending(self, memory)
        if self._thread is None:
            self._thread = Thread(target=self._work, name="penstock-send", daemon=True)
            self._thread.start()
        self._queue.put(pending)
        return pending

    def check(self) -> None:
        """Raise :class:`ConnectionLostError` if the other side is known to be gone."""
        if self._error is not None:
            raise ConnectionLostError(f"Connection to {self._peer} is lost: {self._error.strerror or self._error}")

    def close(self) -> None:
        """Close the connection; what has not left is dropped."""
        shut(self._socket)
        self._queue.put(None)

    def leave(self) -> None:
        """Let go of the connection without closing it: it is another process's."""
        self._socket.close()

    def _work(self) -> None:
        while (pending := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._socket.sendall(pending.memory)
                except OSError as error:
                    self._error = error
            pending.done()
