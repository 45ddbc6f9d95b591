"""Files that are either whole or absent: written aside, synced, renamed, and listed in a manifest with checksums."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import IO, Any

MANIFEST_NAME = "manifest.json"
_CHUNK = 1 << 20
_reading_umask = Lock()


class CorruptFileError(ValueError):
    """A stored file is missing, cut short or altered; the message names the file and what is wrong with it."""


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open ``path`` for binary writing so that it appears whole or not at all.

    The bytes go to a temporary name in the same directory; on a clean exit the file is flushed, synced and renamed
    over ``path`` and the directory is synced. On an exception the temporary file is removed and ``path`` is untouched.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())
        aside.replace(target)
    except BaseException:  # Ctrl-C too: nothing half-written stays, and the error goes on
        aside.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON value to ``path`` atomically, indented, with sorted keys; NaN is refused."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a broken one raises :class:`CorruptFileError` that names it."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise CorruptFileError(f"{path}: the file is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not valid JSON ({error})") from error


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal, read in bounded memory."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def reserve(path: str | os.PathLike[str]) -> None:
    """Take the disk space of a new file that so far has a length alone, before it is written through a map.

    A map of a file on a full disk cannot raise: the system ends the process with SIGBUS at the first page for which
    there is no room.

    Raises:
        OSError: There is not enough room; the message says how much is wanted and how much is there.
    """
    with Path(path).open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot say so beforehand
                return
            free = os.statvfs(path)
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno or 0)}: it takes {size:,} bytes, and {free.f_bavail * free.f_frsize:,} are "
                "free; make room, or write elsewhere",
                os.fspath(path),
            ) from None


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(directory: str | os.PathLike[str], names: Iterable[str], **facts: Any) -> None:
    """Seal a directory: write the manifest that lists each named file's size and SHA-256, plus JSON ``facts``.

    The manifest is written last and atomically, so a directory with a manifest is a complete one.
    """
    root = Path(directory)
    files = {
        name: {"bytes": (root / name).stat().st_size, "sha256": sha256_of(root / name)} for name in sorted(set(names))
    }
    write_json(root / MANIFEST_NAME, {**facts, "files": files})


def read_manifest(directory: str | os.PathLike[str], *, verify: bool = True) -> dict[str, Any]:
    """Read a directory's manifest and, unless told otherwise, check every file's size and SHA-256 against it.

    Raises:
        CorruptFileError: The manifest is missing or malformed, or a file is missing, of another size or altered.
    """
    root = Path(directory)
    path = root / MANIFEST_NAME
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise CorruptFileError(f"{path}: not a manifest (no 'files' table)")
    for name, entry in files.items():
        well_formed = (
            isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        )
        if not well_formed or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CorruptFileError(f"{path}: malformed entry for file {name!r}")
        if verify:
            _check_file(root / name, size=entry["bytes"], sha256=entry["sha256"])
    return dict(manifest)


def _check_file(path: Path, *, size: int, sha256: str) -> None:
    if not path.is_file():
        raise CorruptFileError(f"{path}: listed in the manifest but missing")
    found = path.stat().st_size
    if found != size:
        raise CorruptFileError(f"{path}: {found} bytes, but the manifest lists {size}")
    if sha256_of(path) != sha256:
        raise CorruptFileError(f"{path}: its SHA-256 differs from the manifest's; the file was altered")


def _umask() -> int:
    # It can only be read by setting it: for two threads at once the second would read, and leave, the first's.
    with _reading_umask:
        mask = os.umask(0o077)  # what others make in the meantime is too private rather than too open
        os.umask(mask)
    return mask
