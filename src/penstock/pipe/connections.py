"""Connections between the ranks of a pipeline: one for each neighbour and direction.

Messages between stages are many and often short, and each is waited for. A TCP connection of their own takes them with
one system call a side; a collective library's send and receive negotiate, and hand over between threads.
"""

import json
import os
import secrets
import socket
import struct
import sys
import weakref
from datetime import timedelta
from threading import Condition, Thread
from typing import TYPE_CHECKING, Final

import torch

from penstock._core.waiting import Watcher
from penstock.pipe.addresses import LOOPBACK, chosen_address, machine, own_addresses
from penstock.pipe.incoming import Incoming
from penstock.pipe.outgoing import ConnectionLostError, Outgoing, shut

if TYPE_CHECKING:  # a compiled type: torch.distributed exports it at run time only
    from torch._C._distributed_c10d import Store

_KEY: Final = "penstock/connections"
_HELLO: Final = struct.Struct("<4s16sIc")
_MAGIC: Final = b"PSTC"
_WELCOME: Final = b"OK"
_TOKEN_BYTES: Final = 16
_HANDSHAKE_S: Final = 5.0
"""A peer that takes longer to say who it is, or a host to answer, is none of ours."""


class Connections:
    """This rank's connections, made when they are first asked for.

    Collective: every rank of the world makes one, at the same point of its program. Each listens on a port and tells
    the others where by the store, with a secret that they must know; whoever does not is turned away.

    Args:
        rank: In the world.
        store: The rendezvous store.
        watcher: Told of the waits.

    Raises:
        ValueError: ``GLOO_SOCKET_IFNAME`` names no interface of this machine.
    """

    def __init__(self, rank: int, *, store: "Store", watcher: Watcher) -> None:
        self.rank = rank
        self._store = store
        self._watcher = watcher
        self._outgoing: dict[tuple[int, str], Outgoing] = {}
        self._incoming: dict[tuple[int, str], Incoming] = {}
        token = secrets.token_bytes(_TOKEN_BYTES)
        chosen = chosen_address()
        listener = _listen(chosen)
        self._open = _Open(listener)
        # Each rank's n-th meet the others' n-th.
        self._key = f"{_KEY}/{store.add(f'{_KEY}/{rank}', 1)}"
        place = {
            "token": token.hex(),
            "machine": machine(),
            "addresses": own_addresses() if chosen is None else [chosen],
            "port": listener.getsockname()[1],
        }
        self._here = f"{self._key}/on/{machine()}"
        store.add(self._here, 1)
        store.set(f"{self._key}/{rank}", json.dumps(place))
        # The thread knows nothing of this object, so that connections nobody holds any more are closed.
        Thread(target=_accept, args=(self._open, token), name="penstock-accept", daemon=True).start()
        self._closing = weakref.finalize(self, self._open.close)

    def outgoing(self, peer: int, direction: str) -> Outgoing:
        """The connection to a rank, for sending.

        Args:
            peer: Rank in the world.
            direction: ``"F"`` or ``"B"``.

        Raises:
            WaitError: It cannot be reached; with every address that was tried.
        """
        key = (peer, direction)
        if key not in self._outgoing:
            with self._watcher.waiting(f"connecting ({direction})", peer=peer):
                outgoing = Outgoing(_ready(self._connect(peer, direction)), f"rank {peer}")
            self._open.ends.append(outgoing)
            self._outgoing[key] = outgoing
        return self._outgoing[key]

    def incoming(self, peer: int, direction: str) -> Incoming:
        """The connection from a rank, for receiving; as for :meth:`outgoing`."""
        key = (peer, direction)
        if key not in self._incoming:
            with self._watcher.waiting(f"waiting to be connected ({direction})", peer=peer):
                connection = _ready(self._open.arrived(key))
                incoming = Incoming(connection, f"rank {peer}", looks=self._is_roomy())
            self._open.ends.append(incoming)
            self._incoming[key] = incoming
        return self._incoming[key]

    def close(self) -> None:
        """Close all connections."""
        self._closing()

    def _is_roomy(self) -> bool:
        """Whether this machine has a processor for each thread that computes, of all ranks that have come to it."""
        threads = self._store.add(self._here, 0) * torch.get_num_threads()
        return threads <= (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)

    def _connect(self, peer: int, direction: str) -> socket.socket:
        key = f"{self._key}/{peer}"
        self._store.wait([key], timedelta(seconds=self._watcher.deadline_s))
        place = json.loads(self._store.get(key))
        addresses = list(place["addresses"])
        if place["machine"] == machine() and chosen_address() is None:
            addresses = [LOOPBACK, *(address for address in addresses if address != LOOPBACK)]
        hello = _HELLO.pack(_MAGIC, bytes.fromhex(place["token"]), self.rank, direction.encode())
        failures = []
        for address in addresses:
            try:
                return _greet(address, place["port"], hello)
            except OSError as error:
                failures.append(f"{address} port {place['port']}: {error.strerror or error}")
        raise ConnectionLostError(
            f"cannot connect to rank {peer} on any of its addresses ({'; '.join(failures)}); name the network's "
            "interface with GLOO_SOCKET_IFNAME on every machine, and let its ports through between them"
        )


class _Open:
    """What is open, and who has called."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.ends: list[Outgoing | Incoming] = []
        self._owner = os.getpid()
        self._callers: dict[tuple[int, str], socket.socket] = {}
        self._changed = Condition()

    def arrive(self, key: tuple[int, str], connection: socket.socket) -> None:
        """Note a rank and direction that has connected."""
        with self._changed:
            self._callers[key] = connection
            self._changed.notify_all()

    def arrived(self, key: tuple[int, str]) -> socket.socket:
        """The connection of a rank and direction, once it is there."""
        with self._changed:
            while key not in self._callers:
                self._changed.wait()
            return self._callers.pop(key)

    def close(self) -> None:
        """Close everything, unless this is a forked child: it would close the connections of its parent."""
        if os.getpid() != self._owner:
            return
        shut(self.listener)
        for end in self.ends:
            end.close()
        with self._changed:
            for connection in self._callers.values():
                shut(connection)
            self._callers.clear()
        self.ends.clear()


def _accept(into: _Open, token: bytes) -> None:
    """Take calls until the listener is closed."""
    while True:
        try:
            connection, _ = into.listener.accept()
        except OSError:
            return
        try:
            connection.settimeout(_HANDSHAKE_S)
            magic, known, rank, direction = _HELLO.unpack(_exactly(connection, _HELLO.size))
            if magic == _MAGIC and secrets.compare_digest(known, token):
                connection.sendall(_WELCOME)
                into.arrive((rank, direction.decode("ascii", "replace")), connection)
                continue
        except OSError:  # it hung up, or took too long
            pass
        shut(connection)


def _listen(address: str | None) -> socket.socket:
    """A listening socket on a free port: of one address, or of all."""
    if address is not None:
        return socket.create_server((address, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _greet(address: str, port: int, hello: bytes) -> socket.socket:
    """Connect and say who calls; the answer proves that it is the right listener.

    Raises:
        OSError: Nobody answers there, or somebody else does.
    """
    connection = socket.create_connection((address, port), timeout=_HANDSHAKE_S)
    try:
        connection.sendall(hello)
        if _exactly(connection, len(_WELCOME)) != _WELCOME:
            raise ConnectionRefusedError(f"another program listens at {address}")
    except OSError:
        connection.close()
        raise
    return connection


def _exactly(connection: socket.socket, nbytes: int) -> bytes:
    got = b""
    while len(got) < nbytes:
        piece = connection.recv(nbytes - len(got))
        if not piece:
            raise ConnectionResetError("closed during the greeting")
        got += piece
    return got


def _ready(connection: socket.socket) -> socket.socket:
    """A connection that blocks, and sends at once what it is given."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
