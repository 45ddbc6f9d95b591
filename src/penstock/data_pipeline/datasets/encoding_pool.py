"""Processes that encode batches of documents, whose results come back in order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from penstock.data_pipeline.datasets.encoder import EncodedTexts, Encoder, encode_alone
from penstock.data_pipeline.datasets.text_batches import Place, TextBatch


def encode_in_order(
    batches: Iterable[TextBatch], files: Sequence[Path], encoder: Encoder, *, workers: int
) -> Iterator[tuple[TextBatch, EncodedTexts]]:
    """Encode batches in several processes while this one reads ahead; at most four batches a worker are in memory.

    The workers leave when this process ends, however it ends.

    Args:
        batches: What to encode.
        files: The files that places count, for messages.
        encoder: What encodes.
        workers: How many processes.

    Yields:
        Each batch with its tokens, in the order of the batches.

    Raises:
        ValueError: A document cannot be encoded; the message names its file and number.
        RuntimeError: A worker was killed.
    """
    # Where it is safe, a fork saves the workers all imports, and a tokenizer each.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, _begin, (encoder,))
    waiting: deque[tuple[TextBatch, Future[EncodedTexts | _Refused]]] = deque()

    def first() -> tuple[TextBatch, EncodedTexts]:
        batch, future = waiting[0]
        encoded = future.result()
        if isinstance(encoded, _Refused):
            raise ValueError(f"{_name(files, batch.places[encoded.index])}: cannot be encoded ({encoded.reason})")
        waiting.popleft()
        return batch, encoded

    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch.texts)))
            if len(waiting) >= 4 * workers:
                yield first()
        while waiting:
            yield first()
    except BrokenProcessPool:
        places = [place for batch, _ in waiting for place in batch.places]
        raise RuntimeError(
            f"a worker process was killed, perhaps for want of memory, while {workers} of them encoded "
            f"{_name(files, places[0])} to {_name(files, places[-1])}; run the same again, with fewer workers "
            "(--workers) if memory ran out"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Refused:
    """A document that cannot be encoded: its number in the batch, and why."""

    index: int
    reason: str


_encoder: Encoder | None = None


def _begin(encoder: Encoder) -> None:
    """What a worker does first."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent says what becomes of it
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    encode_alone()
    _encoder = encoder


def _leave_with_parent() -> None:
    """A parent that was killed tells nobody, and its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> EncodedTexts | _Refused:
    assert _encoder is not None
    try:
        return _encoder.encode(texts)
    except Exception as error:  # the library raises bare Exception, and does not say for which document
        for index, text in enumerate(texts):
            try:
                _encoder.encode([text])
            except Exception as reason:  # likewise
                return _Refused(index, str(reason))
        raise RuntimeError(f"{len(texts)} documents can be encoded alone but not together: {error}") from error


def _name(files: Sequence[Path], place: Place) -> str:
    return f"{files[place.file]}, document {place.document + 1}"
