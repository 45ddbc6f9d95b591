"""A dataset while it is being tokenized: finished shards of it on disk, from where a killed run goes on.

The shards lie in ``PREFIX.unfinished``, each an indexed dataset in a directory sealed by a manifest, with checksums and
the place up to which the input has been read. So a shard is there whole or not at all, and the next run begins where
the last whole one ends.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from penstock._core.files import CorruptFileError, read_json, read_manifest, sync_directory, write_json, write_manifest
from penstock.data_pipeline.datasets.encoder import EncodedTexts
from penstock.data_pipeline.datasets.indexed import bin_path, idx_path
from penstock.data_pipeline.datasets.indexed_builder import IndexedDatasetBuilder
from penstock.data_pipeline.datasets.rearrange import merge_indexed
from penstock.data_pipeline.datasets.text_batches import BEGINNING, Place, TextBatch

_SETTINGS: Final = "settings.json"
_WHOLE: Final = "whole"
_SHARD: Final = "tokens"
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
    """Where the shards of a dataset lie until it is whole."""
    return bin_path(prefix).with_suffix(".unfinished")


def settings_there(folder: Path) -> dict[str, Any] | None:
    """The settings that what lies in a folder was begun with; None where nothing usable lies there."""
    if not (folder / _SETTINGS).is_file():
        return None
    found = read_json(folder / _SETTINGS)
    return found if isinstance(found, dict) else None


class UnfinishedTokens:
    """The shards of a dataset that is being tokenized, in order.

    Args:
        prefix: The dataset's path prefix.
        settings: What the tokens depend on, as JSON; what was begun with the same settings is taken up, and anything
            else in the folder is removed.

    Attributes:
        folder: Where the shards lie.
        tally: Of all batches added.
        sealed: Of the batches that are in finished shards.
    """

    def __init__(self, prefix: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.prefix = prefix
        self.folder = unfinished_folder(prefix)
        self._shards: list[Path] = []
        self._builder: IndexedDatasetBuilder | None = None
        self.tally = self.sealed = Tally()
        if settings_there(self.folder) != settings:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            write_json(self.folder / _SETTINGS, dict(settings))
        while (found := self._read_shard()) is not None:
            self.tally = self.sealed = found
        self._clear()

    @property
    def tokenizer(self) -> Path:
        """Where a tokenizer that is trained for the dataset lies until then."""
        return self.folder / _TOKENIZER

    @property
    def shard_tokens(self) -> int:
        """Tokens that would be lost if the process ended now."""
        return self.tally.tokens - self.sealed.tokens

    def add(self, batch: TextBatch, encoded: EncodedTexts) -> None:
        """Add an encoded batch to the open shard."""
        if self._builder is None:
            self._builder = IndexedDatasetBuilder(self._next_shard() / _SHARD, encoded.tokens.dtype)
        self._builder.add_flat(encoded.tokens, encoded.lengths)
        self.tally = self.tally.plus(batch, encoded)

    def seal(self) -> None:
        """Finish the open shard, if there is one: from here on it survives."""
        if self._builder is None:
            return
        self._builder.finalize()
        self._builder = None
        shard = self._next_shard()
        write_manifest(shard, [f"{_SHARD}.bin", f"{_SHARD}.idx"], tally=asdict(self.tally))
        sync_directory(self.folder)
        self._shards.append(shard)
        self.sealed = self.tally

    def finish(self) -> None:
        """Put the shards together under the dataset's name, and remove the folder.

        A dataset of that name from before is there until the new one is written; then first its index goes, so that no
        moment shows an old index beside new tokens.
        """
        self.seal()
        whole = self.folder / _WHOLE
        merge_indexed([shard / _SHARD for shard in self._shards], whole, overwrite=True)
        idx_path(self.prefix).unlink(missing_ok=True)
        bin_path(whole).replace(bin_path(self.prefix))
        idx_path(whole).replace(idx_path(self.prefix))
        sync_directory(self.folder.parent)
        (self.folder / _SETTINGS).unlink()  # what is left from here on is rubbish
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error keep what is finished for another run; nothing if there is nothing."""
        if error is None:
            return
        if self._builder is not None:
            self._builder.abort()
            self._builder = None
        if self._shards:
            error.add_note(f"{self.sealed.documents:,} documents are finished and kept in {self.folder}")
        else:
            shutil.rmtree(self.folder)

    def _next_shard(self) -> Path:
        return self.folder / f"shard_{len(self._shards):06d}"

    def _read_shard(self) -> Tally | None:
        """Take up the next shard if it is there, whole and unaltered."""
        shard = self._next_shard()
        try:
            tally = Tally(**read_manifest(shard)["tally"])
            found = replace(tally, place=Place(*tally.place))
        except (CorruptFileError, KeyError, TypeError):
            return None
        self._shards.append(shard)
        return found

    def _clear(self) -> None:
        """Remove what is not finished: the shard that the process ended in, and any after a broken one."""
        keep = {shard.name for shard in self._shards} | {_SETTINGS, _TOKENIZER}
        for path in self.folder.iterdir():
            if path.name in keep:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
