"""Files that only grow, and a journal of how far each of them is known to be on the disk."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from penstock._core.files import sync_directory

_CHUNK: Final = 1 << 20


class GrowingFile:
    """A file that is appended to, and sealed now and then: what was sealed can later be told from what is broken.

    Args:
        path: The file; nothing is opened before something is added.

    Attributes:
        size: Bytes of it that count: those found whole, and those added since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()

    def holds(self, seal: dict[str, Any]) -> bool:
        """Whether the next stretch is there as it was when :meth:`seal` returned this."""
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                file.seek(self.size)
                left = seal["size"] - self.size
                while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                    digest.update(chunk)
                    left -= len(chunk)
        except FileNotFoundError:
            return False
        return bool(left == 0 and digest.hexdigest() == seal["sha256"])

    def accept(self, seal: dict[str, Any]) -> None:
        """Count the next stretch, which the file :meth:`holds`."""
        self.size = seal["size"]

    def add(self, data: bytes) -> None:
        """Append; what the file holds beyond what counts goes first."""
        if self._file is None:
            self._file = self.path.open("ab")
            self._file.truncate(self.size)
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def seal(self) -> dict[str, Any]:
        """Make durable what was added, and describe the stretch since :meth:`begin_stretch`, as JSON."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"size": self.size, "sha256": self._digest.hexdigest()}

    def begin_stretch(self) -> None:
        """Begin a new stretch: the seal of the last one is kept somewhere."""
        self._digest = hashlib.sha256()

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Journal:
    """A file of JSON objects, a line each with its checksum: one that was cut short in writing does not count.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield each whole entry with the file's size up to its end, until the first broken one."""
        try:
            lines = self._path.open("rb")
        except FileNotFoundError:
            return
        with lines:
            end = 0
            for line in lines:
                end += len(line)
                digest, _, text = line.rstrip(b"\n").partition(b" ")
                if not line.endswith(b"\n") or hashlib.sha256(text).hexdigest().encode() != digest:
                    return
                yield json.loads(text), end

    def cut(self, size: int) -> None:
        """Forget what lies beyond a size that :meth:`entries` told."""
        with self._path.open("ab") as file:
            file.truncate(size)
            os.fsync(file.fileno())
        sync_directory(self._path.parent)

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry, durably."""
        text = json.dumps(entry, sort_keys=True).encode()
        with self._path.open("ab") as file:
            file.write(hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n")
            file.flush()
            os.fsync(file.fileno())
