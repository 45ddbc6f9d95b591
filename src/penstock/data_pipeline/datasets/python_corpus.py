"""A corpus that every machine has: the source files of the running interpreter's standard library.

The list is deterministic for an interpreter: sorted by path, without installed packages, tests and tables that are data
rather than text. A file is held out by a hash of its relative path, so the split does not depend on which other files
there are.
"""

import hashlib
import io
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LEFT_OUT_PARTS: Final = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        # Tests: half of the bytes, and much of that literal data.
        "test",
        "tests",
        "idle_test",
        # Generated tables and prose.
        "encodings",
        "pydoc_data",
        # Gone from Python 3.12 and 3.13 on; left out so that the corpora of different versions are alike.
        "distutils",
        "lib2to3",
        "ensurepip",
        "turtledemo",
        "__phello__",
    }
)
# Build settings, full of the paths of the machine that built the interpreter.
_LEFT_OUT_PREFIXES: Final = ("_sysconfigdata", "_sysconfig_vars", "config-")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the corpus.

    Attributes:
        name: Path relative to the library's root, with forward slashes.
        path: Where it lies.
        size: Bytes on disk.
        heldout: Whether it belongs to the held-out part.
    """

    name: str
    path: Path
    size: int
    heldout: bool


def _hash_unit(name: str, purpose: str) -> float:
    """A number in ``[0, 1)`` that depends on the name only."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest(), "little") / 2.0**64


def standard_library_files(
    root: Path | None = None, *, max_bytes: int | None = None, heldout_fraction: float = 0.05
) -> list[SourceFile]:
    """List the corpus: the standard library's ``.py`` files, sorted by relative path.

    Args:
        root: A directory to list instead of the running interpreter's standard library.
        max_bytes: Keep at most this many bytes. Which files stay is decided by another hash of the path, so that a
            small corpus is a fair sample of the large one; a file stays on its side of the split.
        heldout_fraction: About this share of the files is held out; between 0 and 1.

    Raises:
        ValueError: An argument is out of range, or no source file is found.
    """
    if not 0.0 <= heldout_fraction < 1.0:
        raise ValueError(f"heldout_fraction must be at least 0 and below 1, got {heldout_fraction}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    top = Path(sysconfig.get_paths()["stdlib"]) if root is None else Path(root)
    files = []
    for path in top.rglob("*.py"):
        relative = path.relative_to(top)
        if _LEFT_OUT_PARTS.intersection(relative.parts) or relative.parts[0].startswith(_LEFT_OUT_PREFIXES):
            continue
        try:
            size = path.stat().st_size
        except OSError:  # a dangling link
            continue
        if size and path.is_file():
            name = relative.as_posix()
            files.append(SourceFile(name, path, size, _hash_unit(name, "heldout") < heldout_fraction))
    if not files:
        raise ValueError(
            f"{top}: no Python source file found (a zipped or source-less installation?); name a directory of "
            "Python files or a corpus of your own"
        )
    if max_bytes is not None:
        files = _within(files, max_bytes)
    return sorted(files, key=lambda file: file.name)


def _within(files: list[SourceFile], max_bytes: int) -> list[SourceFile]:
    kept, total = [], 0
    for file in sorted(files, key=lambda file: (_hash_unit(file.name, "cap"), file.name)):
        if total + file.size <= max_bytes:
            kept.append(file)
            total += file.size
    if not kept:
        smallest = min(file.size for file in files)
        raise ValueError(f"max_bytes={max_bytes} is less than the smallest source file ({smallest} bytes)")
    return kept


def read_sources(files: Iterable[SourceFile]) -> Iterator[tuple[str, str]]:
    """Yield ``(name, text)`` for each file, in the order given.

    A file's own encoding declaration is followed, line ends become ``\\n``; a file that cannot be read or decoded, or
    that is blank, is passed over.
    """
    for file in files:
        text = _read(file.path)
        if text is not None and text.strip():
            yield file.name, text


def _read(path: Path) -> str | None:
    try:
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (OSError, SyntaxError, UnicodeDecodeError, LookupError):
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")
