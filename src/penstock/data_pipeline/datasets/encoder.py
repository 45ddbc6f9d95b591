"""From batches of text to flat tokens, in the integers that they are stored in."""

import json
import os
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from penstock.data_pipeline.datasets.encoding_worker import PARALLELISM, encode_flat, plain_tokenizer

# As Megatron draws the line, a little below 2**16 to leave room for added tokens.
_UINT16_LIMIT: Final = 65_500


def smallest_token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any] | np.signedinteger[Any]]:
    """The smaller of uint16 and int32 that holds every token of the vocabulary."""
    return np.uint16 if vocab_size < _UINT16_LIMIT else np.int32


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """The tokens of several documents.

    Attributes:
        tokens: Of all documents, end to end.
        lengths: Tokens of each document, int64.
        text_bytes: UTF-8 bytes of the documents' text.
    """

    tokens: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.int64]
    text_bytes: int


class Encoder:
    """Encodes whole documents as ordinary text, whatever else the tokenizer was set up for.

    Args:
        tokenizer: What encodes; it is copied, not changed: see :func:`plain_tokenizer`.
        end_of_text: The token that ends every document; None appends nothing.

    Attributes:
        dtype: Of the tokens: uint16, or int32 where the vocabulary needs it.

    Raises:
        ValueError: The tokenizer does not know ``end_of_text``.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_text: str | None) -> None:
        end = None if end_of_text is None else tokenizer.token_to_id(end_of_text)
        if end_of_text is not None and end is None:
            raise ValueError(
                f"the tokenizer has no token {end_of_text!r} to end documents with; name one it has with end_of_text "
                "(--end-of-text), or None ('') for none"
            )
        self._end_of_text = end_of_text
        self._ending = [] if end is None else [end]
        self._tokenizer = plain_tokenizer(tokenizer.to_str())
        # The largest number, not how many there are: added tokens may leave holes.
        self.dtype = np.dtype(smallest_token_dtype(1 + max(tokenizer.get_vocab().values(), default=0)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self._tokenizer, self._end_of_text)  # a pickled tokenizer forgets how it treats special tokens

    def encode(self, texts: list[str]) -> EncodedTexts:
        """Encode documents, on all cores unless ``TOKENIZERS_PARALLELISM`` says no."""
        watch_forks()
        texts = [encodable(text) for text in texts]
        lengths, tokens = encode_flat(self._tokenizer, texts, self._ending, self.dtype.char)
        return self.encoded(lengths, tokens, sum(map(_utf8_bytes, texts)))

    def for_worker(self) -> bytes:
        """What :mod:`encoding_worker` is told first, so that it encodes as this encoder does."""
        options = {"tokenizer": self._tokenizer.to_str(), "ending": self._ending, "code": self.dtype.char}
        return json.dumps(options).encode()

    def encoded(self, lengths: list[int], tokens: bytes | bytearray, text_bytes: int) -> EncodedTexts:
        """What :func:`encode_flat` gave, as arrays."""
        flat = np.frombuffer(tokens, self.dtype.newbyteorder("<"))
        return EncodedTexts(flat, np.array(lengths, dtype=np.int64), text_bytes)


def encodable(text: str) -> str:
    """The text itself, or with ``?`` for halves of surrogate pairs: JSON can spell them, but UTF-8 cannot."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def watch_forks() -> None:
    """Keep forked children (a loader's workers) quiet and safe.

    The library's threads do not survive a fork, so a child must encode alone. Left to itself the library arranges that
    too, but prints a warning in every child, unless its variable is set; so it is set for the length of each fork.
    """
    global _forks_watched
    if not _forks_watched:
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork)
        _forks_watched = True


_forks_watched = False
_set_for_fork = False


def _before_fork() -> None:
    global _set_for_fork
    _set_for_fork = PARALLELISM not in os.environ
    if _set_for_fork:
        os.environ[PARALLELISM] = "false"


def _after_fork() -> None:
    if _set_for_fork:
        os.environ.pop(PARALLELISM, None)
