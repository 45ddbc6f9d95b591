"""Processes that encode batches of documents, whose results come back in order."""

import io
import json
import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, NoReturn

from penstock.data_pipeline.datasets import encoding_worker
from penstock.data_pipeline.datasets.encoder import EncodedTexts, Encoder, encodable
from penstock.data_pipeline.datasets.encoding_worker import receive, send
from penstock.data_pipeline.datasets.text_batches import Place, TextBatch

# Batches that a worker is given at most: with so many it stays busy while this process writes to the disk.
_AHEAD: Final = 4


def encode_in_order(
    batches: Iterable[TextBatch], files: Sequence[Path], encoder: Encoder, *, workers: int
) -> Iterator[tuple[TextBatch, EncodedTexts]]:
    """Encode batches in several processes while this one reads ahead; at most eight batches a worker are in memory.

    A process is started when all that run have work, so that a few documents start one. They leave when this process
    ends, however it ends.

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
    waiting: deque[_Task] = deque()
    with closing(_Crew(encoder, files, workers)) as crew:
        for batch in batches:
            task = _Task(batch)
            waiting.append(task)
            crew.give(task)
            while waiting and (waiting[0].encoded is not None or len(waiting) >= 2 * _AHEAD * workers):
                yield waiting[0].batch, crew.result(waiting[0])
                waiting.popleft()
        while waiting:
            yield waiting[0].batch, crew.result(waiting[0])
            waiting.popleft()


class _Task:
    """A batch, and its tokens once they are there."""

    def __init__(self, batch: TextBatch) -> None:
        self.batch = batch
        self.encoded: EncodedTexts | None = None
        self.text_bytes = 0


class _Worker:
    """One process and what it has to do."""

    def __init__(self, encoder: Encoder, files: Sequence[Path], workers: int) -> None:
        # It finds what this process would find; -P keeps the script's own directory out of that.
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", encoding_worker.__file__],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert isinstance(self._process.stdin, io.FileIO)
        assert isinstance(self._process.stdout, io.FileIO)
        self._sink, self.source = self._process.stdin, self._process.stdout
        self.tasks: deque[_Task] = deque()
        self._encoder, self._files, self._workers = encoder, files, workers
        self._told = False

    def close(self) -> None:
        """End the process, whatever it is doing: nothing that it holds is still needed."""
        with self._process:  # closes the pipes, and waits
            self._process.kill()

    def give(self, task: _Task) -> None:
        """Have a batch encoded after those it has."""
        texts = [encodable(text).encode() for text in task.batch.texts]
        task.text_bytes = sum(map(len, texts))
        self.tasks.append(task)
        try:
            if not self._told:
                send(self._sink, [], self._encoder.for_worker())
                self._told = True
            send(self._sink, [len(text) for text in texts], *texts)
        except BrokenPipeError:
            self._ended()

    def take(self) -> None:
        """Wait for the tokens of the first batch it has."""
        try:
            lengths, data = receive(self.source)
        except EOFError:
            self._ended()
        task = self.tasks.popleft()
        if data and not lengths:
            self._refuse(task.batch.places, *json.loads(data))
        task.encoded = self._encoder.encoded(lengths, data, task.text_bytes)

    def _refuse(self, places: Sequence[Place], index: int | None, reason: str) -> NoReturn:
        if index is None:
            raise RuntimeError(f"{len(places)} documents can be encoded alone but not together: {reason}")
        raise ValueError(f"{self._name(places[index])}: cannot be encoded ({reason})")

    def _ended(self) -> NoReturn:
        status = self._process.wait()
        places = [place for task in self.tasks for place in task.batch.places]
        what = "was killed, perhaps for want of memory," if status < 0 else f"ended by itself (status {status})"
        raise RuntimeError(
            f"a worker process {what} while it was to encode {self._name(places[0])} to {self._name(places[-1])}; run "
            f"the same again, with fewer than {self._workers} workers (--workers) if memory ran out"
        ) from None

    def _name(self, place: Place) -> str:
        return f"{self._files[place.file]}, document {place.document + 1}"


class _Crew:
    """The workers, of whom each is given what comes next when it has least to do."""

    def __init__(self, encoder: Encoder, files: Sequence[Path], most: int) -> None:
        self._encoder, self._files, self._most = encoder, files, most
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def close(self) -> None:
        """End all workers."""
        self._selector.close()
        for worker in self._workers:
            worker.close()

    def give(self, task: _Task) -> None:
        """Have a batch encoded; waits while every worker has enough to do."""
        while True:
            worker = min(self._workers, key=lambda worker: len(worker.tasks), default=None)
            if (worker is None or worker.tasks) and len(self._workers) < self._most:
                worker = _Worker(self._encoder, self._files, self._most)
                self._workers.append(worker)
                self._selector.register(worker.source, selectors.EVENT_READ, worker)
            if worker is not None and len(worker.tasks) < _AHEAD:
                worker.give(task)
                return
            self._collect()

    def result(self, task: _Task) -> EncodedTexts:
        """Wait for a batch's tokens."""
        while task.encoded is None:
            self._collect()
        return task.encoded

    def _collect(self) -> None:
        """Wait until a worker has an answer, and take what there is."""
        for key, _ in self._selector.select():
            key.data.take()
