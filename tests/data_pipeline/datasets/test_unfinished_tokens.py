"""What is left of a dataset that was being tokenized, whatever has become of its files."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data_pipeline.datasets import IndexedDataset, IndexedDatasetBuilder, indexed_builder
from penstock.data_pipeline.datasets.encoder import EncodedTexts
from penstock.data_pipeline.datasets.growing_file import GrowingFile
from penstock.data_pipeline.datasets.text_batches import Place, TextBatch
from penstock.data_pipeline.datasets.unfinished_tokens import Tally, UnfinishedTokens, unfinished_folder

BATCHES = 6
SETTINGS = {"what": "a test"}


def batch(number: int) -> tuple[TextBatch, EncodedTexts]:
    """Some documents, among them an empty one, and their tokens."""
    lengths = np.array([number, 0, 3], dtype=np.int64)
    tokens = np.arange(number + 3, dtype=np.uint16) + 100 * number
    places = [Place(0, 3 * number + i) for i in range(3)]
    return TextBatch(["x"] * 3, places, Place(0, 3 * number + 3), 1, 10), EncodedTexts(tokens, lengths, 3)


def go_on(prefix: Path, stop: int = BATCHES, *, finish: bool = True) -> Tally:
    """Add the batches that are missing, and seal after every one."""
    with UnfinishedTokens(prefix, SETTINGS) as unfinished:
        for number in range(unfinished.tally.place.document // 3, stop):
            unfinished.add(*batch(number))
            unfinished.seal()
        if finish:
            unfinished.finish(np.dtype(np.uint16))
        return unfinished.tally


def expected(prefix: Path) -> list[bytes]:
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for number in range(BATCHES):
            _, encoded = batch(number)
            builder.add_flat(encoded.tokens, encoded.lengths)
    return written(prefix)


def written(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")]


@settings(max_examples=15)
@given(
    stop=st.integers(0, BATCHES),
    damage=st.lists(
        st.tuples(
            st.sampled_from(["tokens.bin", "lengths.int32", "journal"]),
            st.floats(0, 1),
            st.sampled_from(["cut", "flip", "add"]),
        ),
        max_size=2,
    ),
)
def test_whatever_is_damaged_is_written_again(
    tmp_path_factory: pytest.TempPathFactory, stop: int, damage: list[tuple[str, float, str]]
) -> None:
    top = tmp_path_factory.mktemp("damaged")
    go_on(top / "c", stop, finish=False)
    for name, share, how in damage:
        file = unfinished_folder(top / "c") / name
        data = bytearray(file.read_bytes()) if file.is_file() else bytearray()
        at = round(share * len(data))
        if how == "cut":
            del data[at:]
        elif how == "add":
            data += bytes(at + 1)
        elif at < len(data):
            data[at] ^= 4
        file.write_bytes(data)
    go_on(top / "c", finish=False)
    tally = go_on(top / "c", 0)  # of what was written again nothing has to be written once more
    assert (tally.documents, tally.skipped) == (3 * BATCHES, BATCHES)
    assert written(top / "c") == expected(top / "plain")
    assert sorted(path.name for path in top.iterdir()) == ["c.bin", "c.idx", "plain.bin", "plain.idx"]


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx"])
def test_an_end_between_the_last_steps_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Before the tokens get their name, or between them and the index; an older dataset is there too."""
    with IndexedDatasetBuilder(tmp_path / "c", np.uint16) as builder:
        builder.add_document([9, 9])
    replace = Path.replace

    def die(self: Path, target: Path) -> Path:
        if self.name == name:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            go_on(tmp_path / "c")
    assert not (tmp_path / "c.idx").exists()
    assert go_on(tmp_path / "c", 0).documents == 3 * BATCHES  # nothing is encoded again
    assert written(tmp_path / "c") == expected(tmp_path / "plain")


def test_a_batch_that_was_half_added_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: GrowingFile, data: bytes) -> None:
        if self.path.name == "lengths.int32" and self.size == 24:
            raise KeyboardInterrupt
        add(self, data)

    def add_three() -> None:
        with UnfinishedTokens(tmp_path / "c", SETTINGS) as unfinished:
            for number in range(3):
                unfinished.add(*batch(number))

    add = GrowingFile.add
    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "add", die)
        with pytest.raises(KeyboardInterrupt):
            add_three()
    go_on(tmp_path / "c")
    assert written(tmp_path / "c") == expected(tmp_path / "plain")


def test_the_disk_has_what_the_journal_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and lengths are synced first; and a kill right after the seal would lose nothing of it."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink().name))
    with UnfinishedTokens(tmp_path / "c", SETTINGS) as unfinished:
        unfinished.add(*batch(1))
        synced.clear()
        unfinished.seal()
        assert synced == ["tokens.bin", "lengths.int32", "c.unfinished", "journal"]
        with UnfinishedTokens(tmp_path / "c", SETTINGS) as after_a_kill:
            assert after_a_kill.sealed == unfinished.tally


def test_an_index_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = expected(tmp_path / "whole")
    monkeypatch.setattr(indexed_builder, "_INDEX_CHUNK", 4)
    assert expected(tmp_path / "pieces") == whole
    go_on(tmp_path / "c")
    assert written(tmp_path / "c") == whole
    assert IndexedDataset(tmp_path / "c").num_documents == 3 * BATCHES
