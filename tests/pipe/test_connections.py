"""Connections between ranks: whole frames in order, without waiting, and never from a stranger."""

import contextlib
import errno
import gc
import json
import os
import random
import socket
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock._core.waiting import WaitError, Watcher
from penstock.pipe import greeting
from penstock.pipe.addresses import chosen_address, own_addresses
from penstock.pipe.buffers import Buffer
from penstock.pipe.connections import Connections
from penstock.pipe.frame import HEADER_BYTES, Address, FrameError, Header, frame_length
from penstock.pipe.incoming import Incoming
from penstock.pipe.outgoing import ConnectionLostError, Outgoing


def frame(data: bytes, micro_batch: int = 0) -> memoryview:
    """A frame with bytes in the place of its tensors."""
    memory = memoryview(bytearray(HEADER_BYTES + len(data)))
    Header(Address("F", 1, 0, micro_batch), 0, 0, len(data), 0).write(memory)
    memory[HEADER_BYTES:] = data
    return memory


@pytest.fixture
def pair() -> Iterator[tuple[Outgoing, Incoming]]:
    """Both ends of a connection from rank 0 to rank 1."""
    a, b = two()
    outgoing = a.outgoing(1, "F")
    yield outgoing, b.incoming(0, "F")
    a.close()
    b.close()


def two() -> tuple[Connections, Connections]:
    store = dist.HashStore()
    a, b = (Connections(rank, store=store, watcher=Watcher(rank=rank)) for rank in (0, 1))
    return a, b


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 400_000)), min_size=1, max_size=12),
    seed=st.integers(0, 1 << 30),
)
def test_frames_arrive_whole_and_in_order(lengths: list[int], seed: int) -> None:
    draw = random.Random(seed)
    a, b = two()
    outgoing, incoming = a.outgoing(1, "F"), b.incoming(0, "F")
    data = [draw.randbytes(length) for length in lengths]
    unsent, arrived = list(enumerate(data)), 0
    pending = []
    while arrived < len(data):
        moves = ["receive"] if arrived + len(unsent) < len(data) else []
        moves += ["send", "send"] if unsent else []
        moves += ["ahead"] if incoming.ahead < len(data) - arrived else []
        move = draw.choice(moves)
        if move == "send":
            index, content = unsent.pop(0)
            pending.append(outgoing.send(frame(content, index)))
        elif move == "ahead":
            incoming.post(Buffer)
        else:
            memory = incoming.receive(Buffer).memory
            assert frame_length(memory) == HEADER_BYTES + lengths[arrived]
            assert memory[HEADER_BYTES : HEADER_BYTES + lengths[arrived]] == data[arrived]
            Header.read(memory, Address("F", 1, 0, arrived))
            arrived += 1
    for left in pending:
        if left is not None:
            left.wait()
    a.close()
    b.close()


def test_what_the_kernel_has_no_room_for_leaves_by_itself(pair: tuple[Outgoing, Incoming]) -> None:
    outgoing, incoming = pair
    data = random.Random(0).randbytes(64 << 20)
    pending = [outgoing.send(frame(data)), outgoing.send(frame(b"x"))]
    assert pending[0] is not None
    assert pending[1] is not None, "a later frame must not overtake"
    assert not pending[0].left
    assert incoming.receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + len(data)] == data
    assert incoming.receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 1] == b"x"
    pending[1].wait()
    assert outgoing.send(frame(b"y")) is None, "there is room again"


class Line:
    """In the place of a socket and of the clock: each frame comes so many seconds after it is first asked for."""

    def __init__(self, delays: list[float]) -> None:
        self.now = self.asked = 0.0
        self.delays = delays
        self.calls = ""

    def recv_into(self, memory: memoryview, flags: int = 0) -> int:
        if not self.calls or self.calls[-1] in "! ":
            self.asked = self.now
        self.now += 10e-6
        there = self.now >= self.asked + self.delays[0]
        if flags & socket.MSG_DONTWAIT and not there:
            self.calls += "?"
            raise BlockingIOError
        self.now = max(self.now, self.asked + self.delays.pop(0))
        self.calls += "!" if flags & socket.MSG_DONTWAIT else "z "
        memory[: 2 * HEADER_BYTES] = frame(bytes(HEADER_BYTES))
        return 2 * HEADER_BYTES


@pytest.mark.parametrize(("looks", "calls"), [(True, "z z ???!" + "?" * 20 + "z z !"), (False, "z " * 6)])
def test_a_rank_looks_out_for_a_frame_after_a_brief_wait(
    monkeypatch: pytest.MonkeyPatch, looks: bool, calls: str
) -> None:
    line = Line([1e-3, 5e-5, 3.5e-5, 5e-3, 1.5e-4, 0.0])
    monkeypatch.setattr("penstock.pipe.incoming.time.perf_counter", lambda: line.now)
    incoming = Incoming(line, "rank 0", looks=looks)  # type: ignore[arg-type]
    for _ in range(6):
        incoming.receive(Buffer)
    assert line.calls == calls


@pytest.mark.parametrize(("processors", "threads", "looks"), [(1, 1, False), (2, 1, True), (3, 2, False), (4, 2, True)])
def test_ranks_look_where_the_machine_has_a_processor_for_each_thread(
    monkeypatch: pytest.MonkeyPatch, processors: int, threads: int, looks: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    a, b = two()
    a.outgoing(1, "F")
    assert b.incoming(0, "F")._looks == looks
    a.close()
    b.close()


def test_each_direction_has_a_connection_of_its_own() -> None:
    a, b = two()
    a.outgoing(1, "B").send(frame(b"back"))
    a.outgoing(1, "F").send(frame(b"forth"))
    b.outgoing(0, "F").send(frame(b"from the other"))
    assert b.incoming(0, "F").receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 5] == b"forth"
    assert b.incoming(0, "B").receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 4] == b"back"
    assert a.incoming(1, "F").receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 14] == b"from the other"
    assert a.outgoing(1, "F") is a.outgoing(1, "F")
    a.close()
    b.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_peer_that_closes_is_named(ahead: bool) -> None:
    a, b = two()
    a.outgoing(1, "F").send(frame(b"last"))
    incoming = b.incoming(0, "F")
    if ahead:
        incoming.post(Buffer)
        incoming.post(Buffer)
    a.close()
    assert incoming.receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 4] == b"last"  # what was sent arrives
    with pytest.raises(ConnectionLostError, match="Connection closed by peer rank 0"):
        incoming.receive(Buffer)
    b.close()


def test_sends_to_a_peer_that_is_gone_are_refused(pair: tuple[Outgoing, Incoming]) -> None:
    outgoing, incoming = pair
    pending = outgoing.send(frame(bytes(64 << 20)))
    assert pending is not None
    incoming.close()
    with pytest.raises(ConnectionLostError, match="Connection to rank 1 is lost: "):
        pending.wait()
    with pytest.raises(ConnectionLostError, match="Connection to rank 1 is lost: "):
        outgoing.send(frame(b""))


def test_connections_that_nobody_holds_are_closed() -> None:
    a, b = two()
    a.outgoing(1, "F")
    incoming = b.incoming(0, "F")
    del a
    gc.collect()
    with pytest.raises(ConnectionLostError, match="closed by peer rank 0"):
        incoming.receive(Buffer)
    b.close()


def test_a_forked_child_neither_closes_its_parents_connections_nor_keeps_them_open() -> None:
    a, b = two()
    outgoing, incoming = a.outgoing(1, "F"), b.incoming(0, "F")
    (ready, tell_ready), (wait, end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            a.close()
            os.write(tell_ready, b"!")
            os.close(end)
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.read(ready, 1)
    outgoing.send(frame(b"still here"))
    assert incoming.receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 10] == b"still here"
    outgoing._socket.close()  # as it is when a process is killed
    incoming._socket.settimeout(20)
    with pytest.raises(ConnectionLostError, match="closed by peer rank 0"):
        incoming.receive(Buffer)
    for pipe in (end, wait, ready, tell_ready):
        os.close(pipe)
    os.waitpid(child, 0)
    a.close()
    b.close()


def test_what_is_no_frame_is_refused(pair: tuple[Outgoing, Incoming]) -> None:
    outgoing, incoming = pair
    outgoing.send(memoryview(b"GET / HTTP/1.1\r\n" * 8))
    with pytest.raises(FrameError, match=r"no frame of version 1 .it begins with 474554202f20.; all ranks must run"):
        incoming.receive(Buffer)


HELLO = b"PSTC" + bytes(4) + b"F" + bytes(16)
"""What a rank begins with; what a stranger cannot know comes after it."""


@pytest.mark.parametrize("hello", [b"", HELLO, HELLO + bytes(32), b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"])
def test_strangers_are_turned_away(hello: bytes) -> None:
    store = dist.HashStore()
    a, b = (Connections(rank, store=store, watcher=Watcher(rank=rank)) for rank in (0, 1))
    place = json.loads(store.get("penstock/connections/1/1"))
    with socket.create_connection(("127.0.0.1", place["port"]), timeout=20) as stranger:
        stranger.sendall(hello)
        with contextlib.suppress(OSError):  # it may have been hung up on before it had ended
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(100):
                pass
    a.outgoing(1, "F").send(frame(b"friend"))
    assert b.incoming(0, "F").receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 6] == b"friend"
    a.close()
    b.close()


def test_a_rank_that_cannot_be_reached_is_named_with_the_remedy() -> None:
    store = dist.HashStore()
    a = Connections(0, store=store, watcher=Watcher(rank=0))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    place = {"token": "00" * 16, "machine": "other", "addresses": ["127.0.0.1", "127.0.0.2"], "port": port}
    store.set("penstock/connections/1/1", json.dumps(place))
    with pytest.raises(
        WaitError,
        match=rf"rank 0, connecting \(F\), peer rank 1: failed: cannot connect .*127.0.0.1 port {port}: Connection "
        rf"refused; 127.0.0.2 port {port}: .*GLOO_SOCKET_IFNAME",
    ):
        a.outgoing(1, "F")
    a.close()


def test_another_listener_at_an_address_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's loopback may lead to another program: the next address is tried."""
    monkeypatch.setattr(greeting, "CALL_S", 0.3)
    store = dist.HashStore()
    a, b = (Connections(rank, store=store, watcher=Watcher(rank=rank)) for rank in (0, 1))
    place = json.loads(store.get("penstock/connections/1/1"))
    with socket.create_server(("127.0.0.2", place["port"])) as other:
        place.update(machine="other", addresses=["127.0.0.2", "127.0.0.1"])
        store.set("penstock/connections/1/1", json.dumps(place))
        other.settimeout(20)
        a.outgoing(1, "F").send(frame(b"here"))
        assert b.incoming(0, "F").receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 4] == b"here"
    a.close()
    b.close()


def test_a_listener_that_is_slow_to_answer_is_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom the caller has given up on is not taken for it."""
    monkeypatch.setattr(greeting, "CALL_S", 0.3)
    answered: list[object] = []

    def slow(connection: socket.socket, token: bytes) -> greeting.Caller | None:
        first = not answered
        answered.append(None)
        if first:
            time.sleep(1.0)
        caller = greeting.answer(connection, token)
        answered.append(caller)
        return caller

    monkeypatch.setattr("penstock.pipe.connections.answer", slow)
    a, b = two()
    a.outgoing(1, "F").send(frame(b"here"))
    assert b.incoming(0, "F").receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 4] == b"here"
    assert answered.count((0, "F")) == 1
    a.close()
    b.close()


def test_who_does_not_call_is_named_though_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.pipe.connections._GRACE_S", 0.0)
    b = Connections(1, store=dist.HashStore(), watcher=Watcher(rank=1, deadline_s=0.01))
    with pytest.raises(
        WaitError, match=r"waiting to be connected \(F\), peer rank 0: failed: rank 0 has not connected"
    ):
        b.incoming(0, "F")
    b.close()


def test_calls_that_fail_do_not_end_the_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ECONNABORTED, "aborted")]
    accept = socket.socket.accept

    def sometimes(listener: socket.socket) -> tuple[socket.socket, object]:
        connection = accept(listener)
        if failing:
            connection[0].close()
            raise failing.pop()
        return connection

    monkeypatch.setattr(socket.socket, "accept", sometimes)
    monkeypatch.setattr("penstock.pipe.connections._PAUSE_S", 0.0)
    a, b = two()
    place = json.loads(a._store.get("penstock/connections/1/1"))
    for _ in range(2):
        with (
            socket.create_connection(("127.0.0.1", place["port"]), timeout=20) as stranger,
            contextlib.suppress(OSError),
        ):
            stranger.recv(1)
    a.outgoing(1, "F").send(frame(b"here"))
    assert b.incoming(0, "F").receive(Buffer).memory[HEADER_BYTES : HEADER_BYTES + 4] == b"here"
    a.close()
    b.close()


def test_the_interface_is_the_one_that_collectives_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert chosen_address() is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert chosen_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME='nothing0' names no interface.*this machine has .*lo"):
        chosen_address()


def test_addresses_lead_towards_the_host_of_the_store_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert own_addresses()[0] == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "no such host")
    assert own_addresses()[-1] == "127.0.0.1"
