"""A dataset while it is being tokenized: what of it is known to be on the disk, from where a killed run goes on.

In ``PREFIX.unfinished`` the tokens grow in the file that becomes the dataset's, the documents' lengths beside them, and
a journal says up to where both are durable, with checksums and the place up to which the input has been read. The next
run begins at the last entry that both files bear out. The tokens are never copied: in the end their file is renamed.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from penstock._core.files import read_json, sync_directory, write_json
from penstock.data_pipeline.datasets.encoder import EncodedTexts
from penstock.data_pipeline.datasets.growing_file import GrowingFile, Journal
from penstock.data_pipeline.datasets.indexed import bin_path, idx_path
from penstock.data_pipeline.datasets.indexed_builder import MAX_LENGTH, write_index
from penstock.data_pipeline.datasets.indexed_dtypes import dtype_code
from penstock.data_pipeline.datasets.text_batches import BEGINNING, Place, TextBatch

_SETTINGS: Final = "settings.json"
_TOKENS: Final = "tokens.bin"
_LENGTHS: Final = "lengths.int32"
_JOURNAL: Final = "journal"
_INDEX: Final = "tokens.idx"
_TOKENIZER: Final = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Tally:
    """How far tokenizing has come.

    Attributes:
        documents: Documents encoded.
        tokens: Tokens of these, ends of document included.
        text_bytes: UTF-8 bytes of their text.
        skipped: Blank documents passed over.
        place: Where reading goes on.
        read_bytes: How much of the input files has been read.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0
    place: Place = BEGINNING
    read_bytes: int = 0

    def plus(self, batch: TextBatch, encoded: EncodedTexts) -> "Tally":
        """The tally after another batch."""
        return Tally(
            self.documents + len(batch.texts),
            self.tokens + len(encoded.tokens),
            self.text_bytes + encoded.text_bytes,
            self.skipped + batch.blank,
            batch.end,
            batch.read_bytes,
        )


def unfinished_folder(prefix: str | os.PathLike[str]) -> Path:
    """Where a dataset lies until it is whole."""
    return bin_path(prefix).with_suffix(".unfinished")


def settings_there(folder: Path) -> dict[str, Any] | None:
    """The settings that what lies in a folder was begun with; None where nothing usable lies there."""
    if not (folder / _SETTINGS).is_file():
        return None
    found = read_json(folder / _SETTINGS)
    return found if isinstance(found, dict) else None


class UnfinishedTokens:
    """What there is of a dataset that is being tokenized.

    Args:
        prefix: The dataset's path prefix.
        settings: What the tokens depend on, as JSON; what was begun with the same settings is taken up, and anything
            else in the folder is removed.

    Attributes:
        folder: Where the files lie.
        tally: Of all batches added.
        sealed: Of the batches that survive whatever happens.
    """

    def __init__(self, prefix: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.prefix = prefix
        self.folder = unfinished_folder(prefix)
        self.tally = self.sealed = Tally()
        self._torn = False
        if settings_there(self.folder) != settings:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            write_json(self.folder / _SETTINGS, dict(settings))
        self._journal = Journal(self.folder / _JOURNAL)
        self._tokens, self._lengths = GrowingFile(self.folder / _TOKENS), GrowingFile(self.folder / _LENGTHS)
        if not self._tokens.path.exists() and self._is_named():
            bin_path(prefix).replace(self._tokens.path)
        self._journal.cut(self._take_up())

    @property
    def tokenizer(self) -> Path:
        """Where a tokenizer that is trained for the dataset lies until then."""
        return self.folder / _TOKENIZER

    @property
    def unsealed_tokens(self) -> int:
        """Tokens that would be lost if the process were killed now."""
        return self.tally.tokens - self.sealed.tokens

    def add(self, batch: TextBatch, encoded: EncodedTexts) -> None:
        """Add an encoded batch."""
        longest = int(encoded.lengths.max(initial=0))
        if longest > MAX_LENGTH:
            raise ValueError(f"a document has {longest:,} tokens, but a sequence holds {MAX_LENGTH:,}; split the text")
        self._torn = True
        self._tokens.add(encoded.tokens.tobytes())
        self._lengths.add(encoded.lengths.astype("<i4").tobytes())
        self.tally = self.tally.plus(batch, encoded)
        self._torn = False

    def seal(self) -> None:
        """Make durable what was added: from here on it survives."""
        if self.tally == self.sealed:
            return
        tokens, lengths = self._tokens.seal(), self._lengths.seal()
        sync_directory(self.folder)
        self._journal.append({"tally": asdict(self.tally), "tokens": tokens, "lengths": lengths})
        self._tokens.begin_stretch()
        self._lengths.begin_stretch()
        self.sealed = self.tally

    def finish(self, dtype: np.dtype[Any]) -> None:
        """Give the files the dataset's name, and remove the folder.

        A dataset of that name from before is there until the new one is written; then first its index goes, so that no
        moment shows an old index beside new tokens.

        Args:
            dtype: Of the tokens.
        """
        self.seal()
        self._close()
        lengths = np.memmap(self._lengths.path, dtype="<i4", mode="r")
        write_index(self.folder / _INDEX, dtype, dtype_code(dtype), lengths, None)
        idx_path(self.prefix).unlink(missing_ok=True)
        self._tokens.path.replace(bin_path(self.prefix))
        (self.folder / _INDEX).replace(idx_path(self.prefix))
        sync_directory(self.folder.parent)
        (self.folder / _SETTINGS).unlink()  # what is left from here on is rubbish
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error keep what there is for another run; nothing if there is nothing."""
        if error is None:
            self._close()
            return
        if not self._torn:  # Ctrl-C may come between a batch's tokens and its lengths
            try:
                self.seal()
            except OSError as reason:  # such as a full disk, which may be the error itself
                error.add_note(f"the last {self.unsealed_tokens:,} tokens could not be kept ({reason})")
        self._close()
        if self.sealed.documents:
            error.add_note(f"{self.sealed.documents:,} documents are finished and kept in {self.folder}")
        elif self.tokenizer.is_file():
            error.add_note(f"the trained tokenizer is kept in {self.folder}")
        else:
            shutil.rmtree(self.folder)

    def _take_up(self) -> int:
        """Take up what the journal says and the files bear out; returns how much of the journal that is, in bytes."""
        tokens, lengths, end = self._tokens, self._lengths, 0
        for entry, after in self._journal.entries():
            if not (tokens.holds(entry["tokens"]) and lengths.holds(entry["lengths"])):
                break
            tokens.accept(entry["tokens"])
            lengths.accept(entry["lengths"])
            found = Tally(**entry["tally"])
            self.tally = self.sealed = replace(found, place=Place(*found.place))
            end = after
        return end

    def _is_named(self) -> bool:
        """Whether a run ended just after the tokens got their name, and before it could remove the folder."""
        named = GrowingFile(bin_path(self.prefix))
        for entry, _ in self._journal.entries():
            if not named.holds(entry["tokens"]):
                return False
            named.accept(entry["tokens"])
        return named.size > 0

    def _close(self) -> None:
        self._tokens.close()
        self._lengths.close()
