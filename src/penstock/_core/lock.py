"""A lock between processes that nobody has to clean up after."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

_POLL_S: Final = 0.2


@contextmanager
def locked(path: str | os.PathLike[str], what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file, which is there only while somebody holds it, or after its holder was killed.

    The system lets go of the lock when its holder ends, however it ends; the file itself means nothing.

    Args:
        path: The file; its directory is made if it is not there.
        what: What the holder does, for the message to others: ``is writing corpus.bin``.
        wait_s: How long to wait for another holder, in seconds.

    Raises:
        TimeoutError: Another process holds it; the message says which, and on what machine.
    """
    file = _acquire(Path(path), time.monotonic() + wait_s)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} {what}")
        file.flush()
        yield
    finally:
        with file:
            Path(path).unlink(missing_ok=True)


def _acquire(path: Path, until: float) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            with file:
                holder = file.read() or "held by another process"
            if time.monotonic() >= until:
                raise TimeoutError(f"{path}: {holder}; wait until it is done, or end it") from None
            time.sleep(_POLL_S)
            continue
        if _is_at(file, path):
            return file
        file.close()  # the one who held it has removed it meanwhile


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
