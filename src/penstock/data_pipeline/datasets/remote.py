"""Files that lie elsewhere, by fsspec: copied once to this machine, where they can be mapped into memory.

A remote place is a URL such as ``s3://bucket/corpus/train``; which kinds work depends on what fsspec finds installed
(``s3fs``, ``gcsfs``, ...). The copy is made anew when the original has changed, as far as fsspec can tell; of files by
HTTP it cannot, and takes them to stay as they are. One process of a machine copies, and others wait for it.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Final

from penstock._core.files import write_bytes
from penstock._core.lock import locked

CACHE_VARIABLE: Final = "PENSTOCK_CACHE"
"""The environment variable that names the directory for copies; ``~/.cache/penstock`` unless it is set."""

_WAIT_S: Final = 24 * 3600.0

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return _URL.match(os.fspath(path)) is not None


def fetch(url: str) -> Path:
    """Copy a remote file, unless an unchanged copy is there, and say where the copy lies.

    Raises:
        ValueError: There is no such file, it cannot be reached, or nothing installed understands the URL.
    """
    import fsspec

    parent, _, name = url.rpartition("/")
    folder = _cache() / hashlib.sha256(parent.encode()).hexdigest()[:16]
    try:
        filesystem, path = fsspec.url_to_fs(url)
        if not filesystem.isfile(path):
            raise ValueError(f"{url}: there is no such file")
        mark = str(filesystem.ukey(path))  # of what is there now: a checksum, or size and time
        target, known = folder / name, folder / f"{name}.origin"
        if not _is_current(target, known, mark):
            with locked(folder / f"{name}.lock", "is fetching it", wait_s=_WAIT_S):
                if not _is_current(target, known, mark):  # another process of this machine may have made it meanwhile
                    _copy(filesystem, path, target)
                    write_bytes(known, mark.encode())
    except (ImportError, OSError, NotImplementedError) as error:
        raise ValueError(f"{url}: cannot be fetched ({error})") from None
    return target


def _is_current(target: Path, known: Path, mark: str) -> bool:
    return target.is_file() and known.is_file() and known.read_text() == mark


def _copy(filesystem: Any, path: str, target: Path) -> None:
    """Copy a file, whole and durably; what was known of an earlier copy goes first."""
    target.with_name(f"{target.name}.origin").unlink(missing_ok=True)
    aside = target.with_name(f"{target.name}.part")
    filesystem.get_file(path, str(aside))
    expected, found = filesystem.size(path), aside.stat().st_size
    if expected is not None and found != expected:
        raise OSError(f"{found:,} bytes came, but the file has {expected:,}")
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(target)


def fetch_pair(url: str) -> str:
    """Copy a remote ``.bin/.idx`` pair; returns the path prefix of the copies."""
    stem = url[:-4] if url.endswith((".bin", ".idx")) else url
    fetch(f"{stem}.bin")
    return str(fetch(f"{stem}.idx"))[: -len(".idx")]


def remote_is_pair(url: str) -> bool:
    """Whether a URL names an indexed dataset: either of its files, or their common prefix."""
    if url.endswith((".bin", ".idx")):
        return True
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(f"{url}.idx")
        return bool(filesystem.isfile(path))
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{url}: cannot be reached ({error})") from None


def _cache() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "penstock") / "remote"
