"""Text files to an indexed dataset: in parallel, in bounded memory, and to be taken up again after a kill."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from penstock._core.lock import locked
from penstock.data_pipeline.datasets.encoder import Encoder
from penstock.data_pipeline.datasets.encoding_pool import encode_in_order
from penstock.data_pipeline.datasets.indexed import bin_path, idx_path
from penstock.data_pipeline.datasets.text import Split, TextFile, check_split, text_files
from penstock.data_pipeline.datasets.text_batches import read_batches
from penstock.data_pipeline.datasets.tokenize import (
    END_OF_TEXT,
    TokenizedCorpus,
    check_bpe,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from penstock.data_pipeline.datasets.unfinished_tokens import UnfinishedTokens, settings_there, unfinished_folder

# What a kill costs at most: so many tokens, or so many seconds.
_SEAL_TOKENS: Final = 1 << 25
_SEAL_S: Final = 30.0
_VOCAB_SIZE: Final = 32_768


@dataclass(frozen=True, slots=True)
class TokenizeProgress:
    """How far :func:`tokenize_files` has come.

    Attributes:
        what: ``training``, ``encoding`` or ``writing``.
        documents: Documents read or encoded, those of earlier runs included.
        tokens: Tokens of them; 0 while training.
        read_bytes: How much of the files that was.
        total_bytes: Size of the files.
    """

    what: str
    documents: int
    tokens: int
    read_bytes: int
    total_bytes: int


def tokenize_files(
    sources: Sequence[str | os.PathLike[str]],
    prefix: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    *,
    vocab_size: int | None = None,
    field: str = "text",
    split: Split = "file",
    end_of_text: str | None = END_OF_TEXT,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[TokenizeProgress], None] | None = None,
) -> TokenizedCorpus:
    """Encode text files and write them as ``prefix.bin`` and ``prefix.idx``, one sequence a document.

    The result depends on the files, the tokenizer and the settings only: not on the number of workers, nor on how often
    the work was cut off. Every half minute what is done is made durable in ``prefix.unfinished``; called again with the
    same arguments the function goes on from there.

    Args:
        sources: Text files, directories of them or URLs, in the order of the result; see :func:`read_texts`.
        prefix: Where to write.
        tokenizer: A tokenizer or its ``tokenizer.json``. None trains a byte-level BPE on the same text, and writes
            it as ``prefix.tokenizer.json``.
        vocab_size: Size of the vocabulary that is trained; 32,768 unless given.
        field: Where the text is in a JSON object or a Parquet table.
        split: What is one document of a plain text file: the whole ``file``, a ``paragraph`` or a ``line``.
        end_of_text: The token that ends every document; None appends nothing.
        workers: Processes that encode; None takes one for each core that this process may use.
        overwrite: Replace a dataset that is there, and what was begun with other settings.
        progress: Called before the first batch and after every one.

    Raises:
        ValueError: A file is missing, unknown or broken, there is no text, the field or the end's token is not there, a
            document cannot be encoded, something lies at ``prefix`` already, or both a tokenizer and the size of one
            are given.
        RuntimeError: A worker process was killed.
        TimeoutError: Another process is writing there.
    """
    start = time.perf_counter()
    check_split(split)
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"encoding takes at least one worker, got workers={workers}")
    files = _input_files(sources)
    total_bytes = sum(file.stat().st_size for file in files)
    if not total_bytes:
        raise ValueError(f"{', '.join(map(str, sources))}: there is nothing in the {len(files)} files")
    for file in files:
        TextFile(file, field, split).check()
    if tokenizer is not None and vocab_size is not None:
        raise ValueError(
            f"vocab_size={vocab_size} is for a tokenizer that is trained, but one is given; leave out either "
            "(--vocab-size or --tokenizer)"
        )
    vocab_size = _VOCAB_SIZE if vocab_size is None else vocab_size
    given = tokenizer if tokenizer is None or isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    encoder = None if given is None else Encoder(given, end_of_text)
    if given is None:
        check_bpe(vocab_size)
        if end_of_text not in (None, END_OF_TEXT):
            raise ValueError(f"a tokenizer that is trained ends documents with {END_OF_TEXT!r}, not {end_of_text!r}")
    settings = {
        "inputs": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "field": field,
        "split": split,
        "end_of_text": end_of_text,
        "tokenizer": f"trained, {vocab_size} tokens" if given is None else _digest(given),
    }

    def tell(what: str, documents: int, tokens: int, read_bytes: int) -> None:
        if progress is not None:
            progress(TokenizeProgress(what, documents, tokens, read_bytes, total_bytes))

    def texts() -> Iterator[str]:
        documents = 0
        for batch in read_batches(files, field, split):
            yield from batch.texts
            documents += len(batch.texts)
            tell("training", documents, 0, batch.read_bytes)

    with locked(bin_path(prefix).with_suffix(".lock"), f"is writing {bin_path(prefix)}"):
        _check_target(prefix, settings, trained=given is None, overwrite=overwrite)
        with UnfinishedTokens(prefix, settings) as unfinished:
            if encoder is None:
                if not unfinished.tokenizer.is_file():
                    tell("training", 0, 0, 0)
                    save_tokenizer(train_bpe(texts(), vocab_size=vocab_size), unfinished.tokenizer)
                encoder = Encoder(load_tokenizer(unfinished.tokenizer), end_of_text)
            tally = unfinished.tally
            tell("encoding", tally.documents, tally.tokens, tally.read_bytes)
            batches = read_batches(files, field, split, tally.place)
            sealed_at = time.monotonic()
            for batch, encoded in encode_in_order(batches, files, encoder, workers=workers):
                unfinished.add(batch, encoded)
                tally = unfinished.tally
                if unfinished.unsealed_tokens >= _SEAL_TOKENS or time.monotonic() - sealed_at > _SEAL_S:
                    unfinished.seal()
                    sealed_at = time.monotonic()
                tell("encoding", tally.documents, tally.tokens, tally.read_bytes)
            if not tally.documents:
                raise ValueError(f"nothing to write to {os.fspath(prefix)}: no document holds any text")
            tell("writing", tally.documents, tally.tokens, total_bytes)
            if given is None:
                save_tokenizer(load_tokenizer(unfinished.tokenizer), trained_tokenizer(prefix))
            unfinished.finish(encoder.dtype)
    return TokenizedCorpus(
        os.fspath(prefix), tally.documents, tally.tokens, tally.text_bytes, tally.skipped, time.perf_counter() - start
    )


def trained_tokenizer(prefix: str | os.PathLike[str]) -> Path:
    """Where the tokenizer goes that is trained for a dataset."""
    return bin_path(prefix).with_suffix(".tokenizer.json")


def _input_files(sources: Sequence[str | os.PathLike[str]]) -> list[Path]:
    if not sources:
        raise ValueError("nothing to tokenize: name at least one text file or directory")
    files = [file for source in sources for file in text_files(source)]
    seen: set[Path] = set()
    for file in files:
        if (place := file.resolve()) in seen:
            raise ValueError(f"{file}: named twice; a document is written once (a mixture can repeat a dataset)")
        seen.add(place)
    return files


def _check_target(prefix: str | os.PathLike[str], settings: dict[str, Any], *, trained: bool, overwrite: bool) -> None:
    """Refuse to replace anything unasked, and to go on with something else than what was begun."""
    if overwrite:
        return
    folder = unfinished_folder(prefix)
    begun = settings_there(folder)
    if begun is None:
        targets = [bin_path(prefix), idx_path(prefix), *([trained_tokenizer(prefix)] if trained else [])]
        there = [str(target) for target in targets if target.exists()]
        if there:
            raise ValueError(
                f"{', '.join(there)}: there already; say overwrite (--overwrite) to replace, or write elsewhere"
            )
    elif begun != settings:
        changes = "; ".join(_changes(begun, settings))
        raise ValueError(
            f"{folder} was begun with other settings ({changes}); run with those to go on, or say overwrite "
            "(--overwrite) to begin anew"
        )


def _changes(begun: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in now:
        if key != "inputs" and begun.get(key) != now[key]:
            yield f"{key}: then {begun.get(key)!r}, now {now[key]!r}"
    then, here = ({name: facts for name, *facts in found.get("inputs", [])} for found in (begun, now))
    different = [name for name in {**then, **here} if then.get(name) != here.get(name)]
    if different:
        name = different[0]
        more = f", and {len(different) - 1} more" if len(different) > 1 else ""
        yield f"inputs: {name} {_input(then.get(name))} then, {_input(here.get(name))} now{more}"
    elif then and list(then) != list(here):
        yield f"inputs: then in the order {', '.join(then)}, now {', '.join(here)}"


def _input(facts: list[int] | None) -> str:
    return "not named" if facts is None else f"{facts[0]:,} bytes of time {facts[1]}"


def _digest(tokenizer: Tokenizer) -> str:
    return f"SHA-256 {hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
