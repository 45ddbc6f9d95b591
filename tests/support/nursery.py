"""Fresh processes without the seconds that their imports take.

A process that has imported everything, and done nothing else, forks a new one for each request. The new one leaves this
file's loop before it begins, so that it ends as a program of its own does: with its exit code, its traceback, its
``atexit`` functions, and the signals that kill it.
"""

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

PRELOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "penstock.runtime", "penstock.pipe", "penstock.models")
"""What takes long; ``torch._dynamo`` is imported by the first optimizer that a process makes."""


@dataclass(frozen=True)
class Birth:
    """What a new process is given.

    Attributes:
        argv: Its arguments.
        env: Its environment, whole.
        stdout: File that it writes to.
        stderr: File that it writes errors to.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    stdout: str
    stderr: str


class Nursery:
    """Forks processes that call a function of a module with their arguments, and tells how they end."""

    def __init__(self, module: str, name: str) -> None:
        tests = Path(__file__).resolve().parents[1]
        self._connection, theirs = Pipe()
        self._codes: dict[int, int] = {}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _MAIN.format(tests=str(tests), module=module, name=name), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def fork(self, birth: Birth) -> int:
        """Start a process; returns its number."""
        self._connection.send(birth)
        while not isinstance(message := self._connection.recv(), int):
            self._note(message)
        return message

    def poll(self, pid: int) -> int | None:
        """The exit code of a process, negative for a signal, or None while it runs."""
        while self._connection.poll():
            self._note(self._connection.recv())
        return self._codes.get(pid)

    def kill(self, pid: int, signal: int) -> None:
        """Send a signal to a process, if it still runs."""
        if self.poll(pid) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal)

    def close(self) -> None:
        """End the server; its children are not waited for."""
        self._connection.close()
        self._server.wait()

    def _note(self, message: tuple[int, int]) -> None:
        pid, status = message
        self._codes[pid] = os.waitstatus_to_exitcode(status)


_MAIN = """
import sys
sys.path.insert(0, {tests!r})
from support.nursery import serve
from {module} import {name}
serve(int(sys.argv[1]))
{name}(sys.argv[1:])
"""


def serve(fd: int) -> None:
    """Fork for every request until the other side is gone; returns in the children only."""
    connection = Connection(fd)
    for name in PRELOADED:
        __import__(name)
    try:
        birth = _next_birth(connection)
    except (EOFError, BrokenPipeError):
        os._exit(0)
    connection.close()
    _become(birth)


def _next_birth(connection: Connection) -> Birth:
    alive: set[int] = set()
    while True:
        while alive and (end := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            alive.remove(end[0])
            connection.send(end)
        if connection.poll(0.005 if alive else None):
            birth: Birth = connection.recv()
            pid = os.fork()
            if pid == 0:
                return birth
            alive.add(pid)
            connection.send(pid)


def _become(birth: Birth) -> None:
    for fd, name in ((1, birth.stdout), (2, birth.stderr)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)
        os.close(file)
    sys.argv[1:] = birth.argv
    os.environ.clear()
    os.environ.update(birth.env)
