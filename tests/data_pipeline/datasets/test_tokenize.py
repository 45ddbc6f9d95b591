"""Text to tokens and back."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from penstock.data_pipeline.datasets import IndexedDataset
from penstock.data_pipeline.datasets.encoder import smallest_token_dtype
from penstock.data_pipeline.datasets.tokenize import (
    END_OF_TEXT,
    load_tokenizer,
    save_tokenizer,
    tokenize_to_indexed,
    train_bpe,
)

TEXTS = [f"the quick brown fox number {i} jumps over the lazy dog\n\tand back again" for i in range(40)] + ["héllo 🦊"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=290)


def test_training_is_deterministic_and_fills_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 290
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert train_bpe(iter(TEXTS), vocab_size=290).to_str() == tokenizer.to_str()


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = _cached()
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


_cache: list[Tokenizer] = []


def _cached() -> Tokenizer:
    if not _cache:
        _cache.append(train_bpe(TEXTS, vocab_size=300))
    return _cache[0]


def test_a_corpus_is_written_document_by_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    calls: list[tuple[int, int]] = []
    texts = ["first", "", f"forged {END_OF_TEXT} end", "héllo"]
    facts = tokenize_to_indexed(texts, tokenizer, tmp_path / "c", progress=lambda d, t: calls.append((d, t)))
    dataset = IndexedDataset(tmp_path / "c")
    kept = [text for text in texts if text]
    assert [tokenizer.decode(list(row[:-1]), skip_special_tokens=False) for row in dataset] == kept
    assert all(row[-1] == 0 for row in dataset)
    assert all((row[:-1] != 0).all() for row in dataset)  # nobody can forge an end
    assert dataset.num_documents == facts.documents == 3
    assert facts.tokens == sum(len(row) for row in dataset) == calls[-1][1]
    assert facts.text_bytes == sum(len(text.encode()) for text in kept)
    assert facts.skipped == 1
    assert dataset.dtype == np.uint16
    assert not tokenizer.encode_special_tokens


def test_batches_do_not_show(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize_to_indexed(TEXTS, tokenizer, tmp_path / "one")
    monkeypatch.setattr("penstock.data_pipeline.datasets.tokenize._BATCH_DOCUMENTS", 3)
    monkeypatch.setattr("penstock.data_pipeline.datasets.tokenize._BATCH_CHARACTERS", 100)
    tokenize_to_indexed(iter(TEXTS), tokenizer, tmp_path / "many")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    texts = ["good", "ba\ud83dd", "\U0001f98a"]
    tokenizer = train_bpe(texts, vocab_size=257)
    tokenize_to_indexed(texts, tokenizer, tmp_path / "c", end_of_text=None)
    assert [tokenizer.decode(list(row)) for row in IndexedDataset(tmp_path / "c")] == ["good", "ba?d", "\U0001f98a"]


def test_without_an_end_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenize_to_indexed(["ab"], tokenizer, tmp_path / "c", end_of_text=None)
    assert tokenizer.decode(list(IndexedDataset(tmp_path / "c")[0])) == "ab"


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, np.uint16), (65_499, np.uint16), (65_500, np.int32), (250_000, np.int32)]
)
def test_the_smallest_dtype_that_holds_the_vocabulary(vocab_size: int, dtype: type) -> None:
    assert smallest_token_dtype(vocab_size) == dtype


def test_a_failure_leaves_nothing_behind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def texts() -> Iterator[str]:
        yield "fine"
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        tokenize_to_indexed(texts(), tokenizer, tmp_path / "c")
    with pytest.raises(ValueError, match="no document holds any text"):
        tokenize_to_indexed(["", ""], tokenizer, tmp_path / "c")
    with pytest.raises(ValueError, match="no token '</s>'"):
        tokenize_to_indexed(["x"], tokenizer, tmp_path / "c", end_of_text="</s>")
    assert list(tmp_path.iterdir()) == []


def test_saving_and_loading(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0]).ids
    with pytest.raises(ValueError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json"):
        load_tokenizer(tmp_path / "bad.json")


def test_mistakes_in_training_are_refused() -> None:
    with pytest.raises(ValueError, match="take at least 257"):
        train_bpe(TEXTS, vocab_size=256)
    with pytest.raises(ValueError, match="min_frequency"):
        train_bpe(TEXTS, vocab_size=300, min_frequency=0)
    with pytest.raises(ValueError, match="no text"):
        train_bpe(["", ""], vocab_size=300)


_FORK = """
import os
from penstock.data_pipeline.datasets.encoder import Encoder
from penstock.data_pipeline.datasets.tokenize import train_bpe
encoder = Encoder(train_bpe(["some text to learn from"] * 50, vocab_size=270), None)
expected = encoder.encode(["some text"] * 20).tokens.tolist()
child = os.fork()
if child == 0:
    os._exit(0 if encoder.encode(["some text"] * 20).tokens.tolist() == expected else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
print(os.environ.get("TOKENIZERS_PARALLELISM"))
"""


@pytest.mark.parametrize("setting", [None, "false"])
def test_a_forked_worker_encodes_in_silence(setting: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    if setting is not None:
        environment["TOKENIZERS_PARALLELISM"] = setting
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip() == str(setting)
