"""A process that encodes: batches of texts come in on a pipe, their tokens go out on another.

Run as a script, by its path, with nothing but the tokenizer imported: as a module of the package it would bring all
that the package imports into every worker, which costs more than encoding a few megabytes. A new program instead of a
fork has none of its parent's threads, locks and open files. It ends when its input ends, so also when its parent was
killed, wherever it is at that moment.

Both directions speak in frames: two int64, ``count`` and ``size``, then ``count`` int64 lengths, then ``size`` bytes,
all little-endian. The first frame in has ``count`` 0 and holds JSON: the tokenizer, the tokens that end a document, the
code of the tokens' type. Each frame after it holds texts in UTF-8 and is answered by a frame of tokens, or by one
without lengths that holds ``[index of the text, or null, reason]`` where a text is refused.
"""

import io
import json
import os
import queue
import signal
import struct
import threading
from typing import Any, Final

from tokenizers import Tokenizer

PARALLELISM: Final = "TOKENIZERS_PARALLELISM"

_HEADER: Final = struct.Struct("<qq")


def plain_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from its JSON that encodes whole documents as ordinary text.

    Truncation and padding that the JSON may ask for are left out: they would cut documents short, or lengthen them. A
    special token spelled out in a document is encoded as text, so that no document can forge an end.
    """
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_flat(tokenizer: Tokenizer, texts: list[str], ending: list[int], code: str) -> tuple[list[int], bytes]:
    """Encode documents.

    Args:
        tokenizer: See :func:`plain_tokenizer`.
        texts: UTF-8 must be able to spell them.
        ending: What follows the tokens of each.
        code: The tokens' type, as :mod:`struct` names it.

    Returns:
        How many tokens each document has, and the tokens of all, little-endian.
    """
    lengths, parts = [], []
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        row = encoding.ids
        row += ending
        lengths.append(len(row))
        parts.append(struct.pack(f"<{len(row)}{code}", *row))  # a third quicker than an array from the list
    return lengths, b"".join(parts)


def send(pipe: io.FileIO, lengths: list[int], *parts: bytes) -> None:
    """Write a frame.

    Raises:
        BrokenPipeError: Nobody reads.
    """
    head = _HEADER.pack(len(lengths), sum(map(len, parts))) + struct.pack(f"<{len(lengths)}q", *lengths)
    left = memoryview(b"".join((head, *parts)))
    while left:
        left = left[pipe.write(left) :]


def receive(pipe: io.FileIO) -> tuple[list[int], bytearray]:
    """Read a frame.

    Returns:
        Its lengths and its bytes.

    Raises:
        EOFError: Nobody writes any more.
    """
    count, size = _HEADER.unpack(_exactly(pipe, _HEADER.size))
    lengths = struct.unpack(f"<{count}q", _exactly(pipe, 8 * count))
    return list(lengths), _exactly(pipe, size)


def _exactly(pipe: io.FileIO, size: int) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        got = pipe.readinto(left)
        if not got:
            raise EOFError
        left = left[got:]
    return data


def _read_ahead(pipe: io.FileIO, requests: "queue.SimpleQueue[tuple[list[int], bytearray]]") -> None:
    """Take the next batches off the pipe while one is encoded, and notice when there will be no more."""
    try:
        while True:
            requests.put(receive(pipe))
    except EOFError:
        os._exit(0)  # also out of the middle of a batch: the parent is gone, or wants no more


def _answer(tokenizer: Tokenizer, texts: list[str], ending: list[int], code: str) -> tuple[list[int], bytes]:
    try:
        return encode_flat(tokenizer, texts, ending, code)
    except Exception as error:  # the library raises bare Exception, and does not say for which document
        for index, text in enumerate(texts):
            try:
                encode_flat(tokenizer, [text], ending, code)
            except Exception as reason:  # likewise
                return [], json.dumps([index, str(reason)]).encode()
        return [], json.dumps([None, str(error)]).encode()


def main() -> None:
    """Encode what comes in on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent says what becomes of it
    os.environ[PARALLELISM] = "false"  # one core is this worker's share
    source, sink = io.FileIO(0, "rb"), io.FileIO(1, "wb")
    try:
        options: dict[str, Any] = json.loads(receive(source)[1])
    except EOFError:
        return
    tokenizer = plain_tokenizer(options["tokenizer"])
    requests: queue.SimpleQueue[tuple[list[int], bytearray]] = queue.SimpleQueue()
    threading.Thread(target=_read_ahead, args=(source, requests), daemon=True).start()
    while True:
        lengths, data = requests.get()
        texts, at = [], 0
        for length in lengths:
            texts.append(data[at : at + length].decode())
            at += length
        counts, tokens = _answer(tokenizer, texts, options["ending"], options["code"])
        try:
            send(sink, counts, tokens)
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    main()
