"""The checkpoints of a run: which there are, which is the newest complete one, which may go."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from penstock._core.files import MANIFEST_NAME, CorruptFileError
from penstock.runtime.checkpoint.names import PARTIAL
from penstock.runtime.checkpoint.reader import Checkpoint

_STEP_NAME = re.compile(r"step_(\d{8,})(\.partial|\.replaced)?")


class Entry(NamedTuple):
    """One step's directory among a run's checkpoints."""

    step: int
    path: Path
    sealed: bool

    def remove(self) -> None:
        """Remove the directory. The manifest goes first, so that what an interruption leaves does not look complete."""
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.path)


def list_checkpoints(directory: str | os.PathLike[str]) -> list[Entry]:
    """The checkpoints of a run, oldest first, sealed or not; empty when there are none."""
    root = Path(directory)
    if not root.is_dir():
        return []
    entries = []
    for path in root.iterdir():
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            sealed = match[2] != PARTIAL and (path / MANIFEST_NAME).is_file()
            entries.append(Entry(int(match[1]), path, sealed))
    # Of two directories of one step, the one in place is the newer.
    return sorted(entries, key=lambda entry: (entry.step, entry.sealed, entry.path.suffix == ""))


def latest_complete(directory: str | os.PathLike[str], say: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None when there is none.

    Complete means: sealed, and all files that the manifest lists are there in their sizes; checksums are verified when
    a file is read. Newer ones that are not complete are passed over.

    Args:
        directory: Where the run's checkpoints lie.
        say: Called with a sentence for every checkpoint that is passed over.
    """
    for entry in reversed(list_checkpoints(directory)):
        try:
            if not entry.sealed:
                raise CorruptFileError(f"{entry.path}: it was not sealed")
            checkpoint = Checkpoint(entry.path)
            checkpoint.verify(checksums=False)
        except CorruptFileError as error:
            if say is not None:
                say(f"passing over an incomplete checkpoint: {error}")
            continue
        return checkpoint
    return None


def prune(directory: str | os.PathLike[str], keep: int) -> list[Path]:
    """Remove all but the newest ``keep`` complete checkpoints, and incomplete ones older than the newest complete one.

    The newest complete checkpoint is never removed, nor anything newer than it.

    Returns:
        The directories that were removed.
    """
    if keep < 1:
        raise ValueError(f"at least one checkpoint must be kept, got keep={keep}")
    newest = latest_complete(directory)
    if newest is None:
        return []
    entries = list_checkpoints(directory)
    older = entries[: next(i for i, entry in enumerate(entries) if entry.path == newest.path)]
    spare = keep - 1
    removed = []
    for entry in reversed(older):
        if entry.sealed and spare > 0:
            spare -= 1
            continue
        entry.remove()
        removed.append(entry.path)
    return removed
