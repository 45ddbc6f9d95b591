"""Text files to a dataset: in parallel, cut off anywhere, and the same result."""

import gzip
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from penstock.data_pipeline.datasets import IndexedDataset, text_batches
from penstock.data_pipeline.datasets.growing_file import Journal
from penstock.data_pipeline.datasets.tokenize import save_tokenizer, train_bpe
from penstock.data_pipeline.datasets.tokenize_files import TokenizeProgress, tokenize_files
from penstock.data_pipeline.datasets.unfinished_tokens import unfinished_folder

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks")
DOCUMENTS = [f"document {i}: the quick brown fox jumps over dog {i * i} and back, ünd zurück" for i in range(60)]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_batches, "_BATCH_CHARACTERS", 300)
    monkeypatch.setattr("penstock.data_pipeline.datasets.tokenize_files._SEAL_TOKENS", 300)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The workers that are started."""
    found: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        found.append(_popen(*arguments, **options))
        return found[-1]

    monkeypatch.setattr("penstock.data_pipeline.datasets.encoding_pool.subprocess.Popen", start)
    return found


_popen = subprocess.Popen


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents in files of every kind, with blank ones between, in the order of the files' names."""
    top = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (top / "a.jsonl").write_text("\n".join([*lines[:15], '{"text": " "}', *lines[15:20]]) + "\n")
    (top / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:30]).encode()))
    (top / "c.jsonl.zst").write_bytes(pa.compress("\n".join(lines[30:40]).encode(), codec="zstd", asbytes=True))
    (top / "d").mkdir()
    for number in range(40, 50):
        (top / "d" / f"{number}.txt").write_text(DOCUMENTS[number])
    pq.write_table(pa.table({"text": [*DOCUMENTS[50:], ""]}), top / "e.parquet")
    return top


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(DOCUMENTS, vocab_size=300)


def plainly(tokenizer: Tokenizer) -> list[list[int]]:
    return [[*tokenizer.encode(text).ids, 0] for text in DOCUMENTS]


def written(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_result_is_that_of_encoding_one_after_another(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, workers: int
) -> None:
    seen: list[TokenizeProgress] = []
    facts = tokenize_files([corpus], tmp_path / "c", tokenizer, workers=workers, progress=seen.append)
    dataset = IndexedDataset(tmp_path / "c")
    assert [row.tolist() for row in dataset] == plainly(tokenizer)
    assert dataset.num_documents == facts.documents == len(DOCUMENTS)
    assert facts.tokens == dataset.num_tokens == seen[-1].tokens
    assert facts.text_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert facts.skipped == 2
    assert [now.documents for now in seen] == sorted(now.documents for now in seen)
    total = sum(file.stat().st_size for file in corpus.rglob("*") if file.is_file())
    assert all(0 <= now.read_bytes <= now.total_bytes == total for now in seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def in_a_child(work: Callable[[], object]) -> int:
    """Run something in a forked process; how it ended: 0, or a signal's number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def dying_at(event: int) -> None:
    """Let this process be killed at its n-th touch of a file from here on."""
    left, me = [event], os.getpid()

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod") and os.getpid() == me:
            left[0] -= 1
            if not left[0]:
                os.kill(me, signal.SIGKILL)

    sys.addaudithook(hook)


@linux
@settings(max_examples=10)
@given(kills=st.lists(st.integers(1, 170), min_size=1, max_size=4), workers=st.integers(1, 2))
def test_no_kill_loses_or_doubles_a_document(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, kills: list[int], workers: int
) -> None:
    """Wherever it is killed, also in training, the next run goes on; in the end the files are an unbroken run's."""
    folder = tmp_path_factory.mktemp("killed")

    def tokenize(prefix: Path) -> None:
        tokenize_files([corpus], prefix, vocab_size=280, workers=workers)

    def tokenize_and_die(event: int) -> None:
        dying_at(event)
        tokenize(folder / "c")

    if not _unbroken:
        tokenize(folder / "once")
        _unbroken.append((folder / "once").resolve())
    died = True
    for event in kills:
        died = in_a_child(lambda event=event: tokenize_and_die(event)) == signal.SIGKILL
        if not died or ((folder / "c.idx").is_file() and not (folder / "c.unfinished" / "settings.json").is_file()):
            break  # it was finished
    else:
        tokenize(folder / "c")
        assert not (folder / "c.unfinished").exists()
    assert written(folder / "c") == written(_unbroken[0])
    assert (folder / "c.tokenizer.json").read_bytes() == _unbroken[0].with_suffix(".tokenizer.json").read_bytes()


_unbroken: list[Path] = []


@linux
def test_workers_leave_with_a_killed_parent(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, started: list[subprocess.Popen[bytes]]
) -> None:
    reading, writing = os.pipe()

    def work() -> None:
        os.close(reading)
        os.dup2(writing, 2)  # which the workers inherit
        tokenize_files([corpus], tmp_path / "c", tokenizer, workers=2, progress=die)

    def die(now: TokenizeProgress) -> None:
        if now.documents:
            os.write(writing, b"x" * len(started))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(work) == signal.SIGKILL
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"xx"  # it ends when nobody holds the other end any more


def test_a_killed_worker_is_told(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, started: list[subprocess.Popen[bytes]]
) -> None:
    def kill_one(now: TokenizeProgress) -> None:
        if now.documents > 30:
            started[0].kill()

    with pytest.raises(RuntimeError, match=r"worker process was killed.*, document \d+ to .*, document \d+;") as caught:
        tokenize_files([corpus], tmp_path / "c", tokenizer, workers=1, progress=kill_one)
    assert "are finished and kept" in caught.value.__notes__[0]
    assert all(worker.returncode is not None for worker in started)
    tokenize_files([corpus], tmp_path / "c", tokenizer, workers=2)
    assert [row.tolist() for row in IndexedDataset(tmp_path / "c")] == plainly(tokenizer)


def test_a_document_that_cannot_be_encoded_is_named(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"one": 0, "two": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    (tmp_path / "a.txt").write_text("one\n\none two\ntwo three\none\n")
    with pytest.raises(ValueError, match=r"a.txt, document 4: cannot be encoded \(.*UNK"):
        tokenize_files([tmp_path / "a.txt"], tmp_path / "c", words, split="line", end_of_text=None, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def cut_off(corpus: Path, prefix: Path, tokenizer: Tokenizer, **options: object) -> None:
    """Leave some sealed stretches behind."""

    def stop(now: TokenizeProgress) -> None:
        if now.documents > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_files([corpus], prefix, tokenizer, workers=1, progress=stop, **options)  # type: ignore[arg-type]


def test_a_resumed_run_goes_on_and_redoes_what_is_damaged(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    seen: list[TokenizeProgress] = []
    cut_off(corpus, tmp_path / "c", tokenizer)
    folder = unfinished_folder(tmp_path / "c")
    sealed = [entry for entry, _ in Journal(folder / "journal").entries()]
    assert len(sealed) > 2
    tokens = bytearray((folder / "tokens.bin").read_bytes())
    tokens[sealed[0]["tokens"]["size"]] ^= 1
    (folder / "tokens.bin").write_bytes(tokens)
    tokenize_files([corpus], tmp_path / "c", tokenizer, workers=1, progress=seen.append)
    assert seen[0].documents == sealed[0]["tally"]["documents"]
    assert [row.tolist() for row in IndexedDataset(tmp_path / "c")] == plainly(tokenizer)


def test_an_orderly_end_keeps_what_was_encoded_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n".join(DOCUMENTS))
    monkeypatch.setattr("penstock.data_pipeline.datasets.tokenize_files._SEAL_TOKENS", 1 << 25)

    def stop(now: TokenizeProgress) -> None:
        if now.what == "encoding" and now.documents >= limits[0]:
            raise KeyboardInterrupt

    limits = [0, 10]
    seen: list[TokenizeProgress] = []
    for note in ("the trained tokenizer is kept", "documents are finished and kept"):
        with pytest.raises(KeyboardInterrupt) as caught:
            tokenize_files([file], tmp_path / "c", vocab_size=280, split="line", workers=1, progress=stop)
        assert note in caught.value.__notes__[0]
        del limits[0]
    tokenize_files([file], tmp_path / "c", vocab_size=280, split="line", workers=1, progress=seen.append)
    assert {now.what for now in seen} == {"encoding", "writing"}
    assert 10 <= seen[0].documents < len(DOCUMENTS)
    assert [row.tolist() for row in IndexedDataset(tmp_path / "c")] == plainly(
        Tokenizer.from_file(str(tmp_path / "c.tokenizer.json"))
    )


def test_two_at_once_are_kept_apart(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    def again(now: TokenizeProgress) -> None:
        if now.documents:
            with pytest.raises(TimeoutError, match=rf"process {os.getpid()} on .* is writing .*c.bin"):
                tokenize_files([corpus], tmp_path / "c", tokenizer, workers=1, overwrite=True)

    tokenize_files([corpus / "d"], tmp_path / "c", tokenizer, workers=1, progress=again)
    assert [row.tolist() for row in IndexedDataset(tmp_path / "c")] == plainly(tokenizer)[40:50]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_other_settings_are_refused_and_both_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text, "body": "x"}) + "\n" for text in DOCUMENTS))
    cut_off(file, tmp_path / "c", tokenizer)
    for options, sentence in (
        ({"field": "body"}, "field: then 'text', now 'body'"),
        ({"split": "line"}, "split: then 'file', now 'line'"),
        ({"end_of_text": None}, "end_of_text: then .*, now None"),
    ):
        with pytest.raises(ValueError, match=rf"c.unfinished was begun with other settings \({sentence}\)"):
            tokenize_files([file], tmp_path / "c", tokenizer, **options)
    with pytest.raises(ValueError, match=r"tokenizer: then 'SHA-256 .*', now 'trained, 300 tokens'"):
        tokenize_files([file], tmp_path / "c", vocab_size=300)
    size = file.stat().st_size
    with file.open("a") as appended:
        appended.write('{"text": "one more"}\n')
    with pytest.raises(
        ValueError, match=rf"inputs: .*a.jsonl {size:,} bytes of .* then, {size + 21:,} bytes of .* now"
    ):
        tokenize_files([file], tmp_path / "c", tokenizer)
    tokenize_files([file], tmp_path / "c", tokenizer, workers=1, overwrite=True)
    assert len(IndexedDataset(tmp_path / "c")) == len(DOCUMENTS) + 1
    with pytest.raises(ValueError, match=r"c.bin, .*c.idx: there already"):
        tokenize_files([file], tmp_path / "c", tokenizer)


def test_what_a_tokenizer_file_says_of_cutting_and_filling_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(5)
    copy.enable_padding()
    save_tokenizer(copy, tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("\n".join(DOCUMENTS))
    tokenize_files([tmp_path / "a.txt"], tmp_path / "c", tmp_path, split="line", workers=1)
    assert [row.tolist() for row in IndexedDataset(tmp_path / "c")] == plainly(tokenizer)


def test_mistakes_are_refused_before_anything_is_written(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    empty, blank, other = tmp_path / "empty.txt", tmp_path / "blank.txt", tmp_path / "other.parquet"
    empty.touch()
    blank.write_text(" \n")
    pq.write_table(pa.table({"body": ["x"]}), other)
    before = sorted(tmp_path.iterdir())
    for sources, options, sentence in (
        ([], {}, "nothing to tokenize"),
        ([empty], {}, "there is nothing in the 1 files"),
        ([blank], {"workers": 1}, "no document holds any text"),
        ([corpus, corpus / "a.jsonl"], {}, "a.jsonl: named twice"),
        ([corpus], {"field": "txt"}, "a.jsonl, line 1: unknown field 'txt'; did you mean 'text'"),
        ([corpus / "d", other], {}, "other.parquet: unknown column 'text'"),
        ([corpus], {"workers": 0}, "at least one worker"),
        ([corpus], {"split": "word"}, "unknown split 'word'"),
        ([corpus], {"end_of_text": "</s>"}, "has no token '</s>'"),
        ([corpus], {"tokenizer": None, "vocab_size": 20}, "vocab_size=20 is too small"),
        ([corpus], {"vocab_size": 300}, "vocab_size=300 is for a tokenizer that is trained"),
        ([corpus], {"tokenizer": None, "end_of_text": "</s>"}, "that is trained ends documents with"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tokenize_files(sources, tmp_path / "c", **{"tokenizer": tokenizer, **options})  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == before
