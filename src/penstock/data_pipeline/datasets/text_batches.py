"""Many documents at once, each with the place where it was read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from penstock.data_pipeline.datasets.text import Split, TextFile

_BATCH_CHARACTERS: Final = 1 << 18
_BATCH_DOCUMENTS: Final = 4096


class Place(NamedTuple):
    """A document's place in the input.

    Attributes:
        file: Number of the file.
        document: Number of the document in it, from 0; blank ones count.
    """

    file: int
    document: int


BEGINNING: Final = Place(0, 0)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Documents in the order of the input.

    Attributes:
        texts: The documents.
        places: Where each was read.
        end: Where reading goes on after them.
        blank: Documents passed over among them, because there is nothing in them.
        read_bytes: How much of the files was read when the batch was full, all earlier ones included.
    """

    texts: list[str]
    places: list[Place]
    end: Place
    blank: int
    read_bytes: int


def read_batches(files: Sequence[Path], field: str, split: Split, start: Place = BEGINNING) -> Iterator[TextBatch]:
    """Read documents in batches of about a quarter of a million characters.

    Args:
        files: Text files; see :class:`TextFile`, also for ``field`` and ``split``.
        field: Where the text is in a JSON object or a Parquet table.
        split: What is one document of a plain text file.
        start: The first document to read.

    Yields:
        Batches; the last may hold no text, where the input ends in blank documents.
    """
    texts: list[str] = []
    places: list[Place] = []
    characters = blank = 0
    before = sum(file.stat().st_size for file in files[: start.file])
    for number in range(start.file, len(files)):
        file = TextFile(files[number], field, split)
        for index, text in enumerate(file):
            if (number, index) < start:
                continue
            if not text or text.isspace():
                blank += 1
                continue
            texts.append(text)
            places.append(Place(number, index))
            characters += len(text)
            if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
                yield TextBatch(texts, places, Place(number, index + 1), blank, before + file.position)
                texts, places, characters, blank = [], [], 0, 0
        before += file.size
    if texts or blank:
        yield TextBatch(texts, places, Place(len(files), 0), blank, before)
