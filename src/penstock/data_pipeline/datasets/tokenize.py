"""From text to tokens: train or load a tokenizer, and write a corpus as an indexed dataset.

The tokenizer is a byte-level BPE (Sennrich et al., "Neural machine translation of rare words with subword units", ACL
2016; bytes as the alphabet as in Radford et al., "Language models are unsupervised multitask learners", 2019), so that
any text has an encoding and decoding gives the text back.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from penstock._core.files import write_bytes
from penstock.data_pipeline.datasets.encoder import Encoder, encodable, watch_forks
from penstock.data_pipeline.datasets.indexed_builder import IndexedDatasetBuilder

END_OF_TEXT: Final = "<|endoftext|>"
"""Follows every document, and is the only special token of a trained vocabulary."""

_BYTES: Final = 256
_BATCH_CHARACTERS: Final = 4_000_000
_BATCH_DOCUMENTS: Final = 4_096


@dataclass(frozen=True, slots=True)
class TokenizedCorpus:
    """What :func:`tokenize_to_indexed` wrote.

    Attributes:
        prefix: The dataset is ``prefix.bin`` and ``prefix.idx``.
        documents: Documents written.
        tokens: Tokens written, ends of document included.
        text_bytes: UTF-8 bytes of the documents' text: what bits per byte are divided by.
        skipped: Empty documents passed over.
        seconds: Wall-clock time.
    """

    prefix: str
    documents: int
    tokens: int
    text_bytes: int
    skipped: int
    seconds: float


def train_bpe(texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """Train a byte-level BPE whose vocabulary holds the 256 bytes and ``<|endoftext|>`` (id 0).

    The same texts in the same order give the same tokenizer.

    Args:
        texts: Documents; read once.
        vocab_size: Size of the vocabulary, at least 257. With little text it may come out smaller.
        min_frequency: A pair seen fewer times is not merged.

    Raises:
        ValueError: An argument is out of range, or there is no text.
    """
    check_bpe(vocab_size, min_frequency)
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield encodable(text)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    watch_forks()
    tokenizer.train_from_iterator(counted(), trainer=trainer)
    if not seen:
        raise ValueError("no text to train a tokenizer on: every document is empty")
    return tokenizer


def check_bpe(vocab_size: int, min_frequency: int = 2) -> None:
    """Refuse what :func:`train_bpe` cannot train."""
    if vocab_size < _BYTES + 1:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: a byte-level vocabulary holds {_BYTES} bytes and "
            f"{END_OF_TEXT!r}; take at least {_BYTES + 1}"
        )
    if min_frequency < 1:
        raise ValueError(f"min_frequency must be at least 1, got {min_frequency}")


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write ``tokenizer.json``, atomically."""
    write_bytes(path, tokenizer.to_str(pretty=True).encode())


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a ``tokenizer.json``, or the one in a directory.

    Raises:
        ValueError: It is missing or malformed.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: there is no such tokenizer file")
    try:
        return Tokenizer.from_buffer(file.read_bytes())
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer.json ({error})") from None


def tokenize_to_indexed(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    prefix: str | os.PathLike[str],
    *,
    end_of_text: str | None = END_OF_TEXT,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedCorpus:
    """Encode documents and write them as ``prefix.bin`` and ``prefix.idx``, one sequence a document.

    The files appear whole or not at all, and are the same for the same texts and tokenizer.

    Args:
        texts: Documents, read once; empty ones are passed over and counted.
        tokenizer: What encodes; its vocabulary decides between uint16 and int32 tokens.
        prefix: Where to write.
        end_of_text: The token that ends every document; None appends nothing.
        progress: Called with ``(documents, tokens)`` so far, after every batch.

    Raises:
        ValueError: The tokenizer does not know ``end_of_text``, or no document holds any text.
    """
    start = time.perf_counter()
    encoder = Encoder(tokenizer, end_of_text)
    skipped = 0

    def not_empty() -> Iterator[str]:
        nonlocal skipped
        for text in texts:
            if text:
                yield text
            else:
                skipped += 1

    documents = tokens = text_bytes = 0
    with IndexedDatasetBuilder(prefix, encoder.dtype) as builder:
        for batch in _batches(not_empty()):
            encoded = encoder.encode(batch)
            builder.add_flat(encoded.tokens, encoded.lengths)
            documents += len(batch)
            tokens += len(encoded.tokens)
            text_bytes += encoded.text_bytes
            if progress is not None:
                progress(documents, tokens)
        if not documents:
            raise ValueError(f"nothing to write to {os.fspath(prefix)}: no document holds any text")
    return TokenizedCorpus(os.fspath(prefix), documents, tokens, text_bytes, skipped, time.perf_counter() - start)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
