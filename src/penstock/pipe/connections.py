"""Connections between the ranks of a pipeline: one for each neighbour and direction.

Messages between stages are many and often short, and each is waited for. A TCP connection of their own takes them with
one system call a side; a collective library's send and receive negotiate, and hand over between threads.
"""

import json
import os
import secrets
import socket
import sys
import time
import weakref
from datetime import timedelta
from threading import Condition, Thread
from typing import TYPE_CHECKING, Final

import torch

from penstock._core.waiting import Watcher
from penstock.pipe.addresses import LOOPBACK, chosen_address, machine, own_addresses
from penstock.pipe.greeting import TOKEN_BYTES, Caller, answer, call
from penstock.pipe.incoming import Incoming
from penstock.pipe.outgoing import ConnectionLostError, Outgoing, shut

if TYPE_CHECKING:  # a compiled type: torch.distributed exports it at run time only
    from torch._C._distributed_c10d import Store

_KEY: Final = "penstock/connections"
_GRACE_S: Final = 2.0
"""A watcher that runs ends a wait sooner, and says more."""
_PAUSE_S: Final = 0.05


class Connections:
    """This rank's connections, made when they are first asked for.

    Collective: every rank of the world makes one, at the same point of its program. Each listens on a port and tells
    the others where by the store, with a secret that both sides prove to know (:mod:`penstock.pipe.greeting`); whoever
    does not is turned away.

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
        token = secrets.token_bytes(TOKEN_BYTES)
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
                connection = _ready(self._open.arrived(key, self._watcher.deadline_s + _GRACE_S))
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
        port, token = place["port"], bytes.fromhex(place["token"])
        until = time.monotonic() + self._watcher.deadline_s
        again = True
        while again:
            failures = []
            again = False
            for address in addresses:
                try:
                    return call(address, port, token, Caller(self.rank, direction))
                except OSError as error:
                    failures.append(f"{address} port {port}: {error.strerror or error}")
                    # Packets may be lost and machines be busy; one that says no will say it again.
                    again |= isinstance(error, TimeoutError) and time.monotonic() < until
        raise ConnectionLostError(
            f"cannot connect to rank {peer} on any of its addresses ({'; '.join(failures)}); name the network's "
            "interface with GLOO_SOCKET_IFNAME on every machine, and let its ports through between them"
        )


_all_open: "weakref.WeakSet[_Open]" = weakref.WeakSet()


class _Open:
    """What is open, and who has called."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.ends: list[Outgoing | Incoming] = []
        self.closed = False
        _all_open.add(self)
        self._callers: dict[tuple[int, str], socket.socket] = {}
        self._changed = Condition()

    def arrive(self, key: tuple[int, str], connection: socket.socket) -> None:
        """Note a rank and direction that has connected."""
        with self._changed:
            if self.closed:
                shut(connection)
                return
            self._callers[key] = connection
            self._changed.notify_all()

    def arrived(self, key: tuple[int, str], limit_s: float) -> socket.socket:
        """The connection of a rank and direction, once it is there.

        Raises:
            ConnectionLostError: It does not come within so many seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._callers, limit_s):
                raise ConnectionLostError(f"rank {key[0]} has not connected within {limit_s:g} s")
            return self._callers.pop(key)

    def leave(self) -> None:
        """In a forked child: hold nothing open of what is its parent's, whose peers are to see that it ends."""
        for end in self.ends:
            end.leave()
        for connection in (self.listener, *self._callers.values()):
            connection.close()
        self.closed = True

    def close(self) -> None:
        """Close everything."""
        if self.closed:
            return
        self.closed = True
        shut(self.listener)
        for end in self.ends:
            end.close()
        with self._changed:
            for connection in self._callers.values():
                shut(connection)
            self._callers.clear()
        self.ends.clear()


def _leave_all() -> None:
    for opened in list(_all_open):
        opened.leave()


os.register_at_fork(after_in_child=_leave_all)


def _accept(into: _Open, token: bytes) -> None:
    """Take calls until the listener is closed, each on a thread of its own: a stranger may be silent for long."""
    while not into.closed:
        try:
            connection, _ = into.listener.accept()
        except OSError:  # closed; or a call that ended early, or no file is left for it for now: others will come
            if not into.closed:
                time.sleep(_PAUSE_S)
            continue
        Thread(target=_admit, args=(connection, into, token), name="penstock-greet", daemon=True).start()


def _admit(connection: socket.socket, into: _Open, token: bytes) -> None:
    caller = answer(connection, token)
    if caller is None:
        shut(connection)
    else:
        into.arrive(caller, connection)


def _listen(address: str | None) -> socket.socket:
    """A listening socket on a free port: of one address, or of all."""
    if address is not None:
        return socket.create_server((address, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _ready(connection: socket.socket) -> socket.socket:
    """A connection that blocks, sends at once what it is given, and ends if the other machine vanishes."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
