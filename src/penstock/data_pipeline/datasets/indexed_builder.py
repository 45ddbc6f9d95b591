"""Writes the ``.bin``/``.idx`` pair that :mod:`penstock.data_pipeline.datasets.indexed` describes and reads."""

import os
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np
import numpy.typing as npt

from penstock._core.files import atomic_file
from penstock.data_pipeline.datasets.indexed import (
    HEADER,
    MAGIC,
    VERSION,
    IndexedDataset,
    bin_path,
    idx_path,
)
from penstock.data_pipeline.datasets.indexed_dtypes import DtypeCodes, dtype_code

MAX_LENGTH: Final = (1 << 31) - 1
"""Tokens that a sequence holds at most."""
_COPY_BYTES: Final = 1 << 24
_INDEX_CHUNK: Final = 1 << 20


class _AbandonError(Exception):
    """Raised inside the open files to make them vanish."""


class IndexedDatasetBuilder:
    """Writes sequences of tokens to an indexed dataset, which appears whole on :meth:`finalize` or not at all.

    Usable as a context manager: a clean exit finalizes, an exception leaves nothing behind::

        with IndexedDatasetBuilder("corpus", np.uint16) as builder:
            for tokens in documents:
                builder.add_document(tokens)

    Args:
        path_prefix: The common part of the two files' paths; either file's own path will do.
        dtype: How tokens are stored: one of the format's dtypes. Tokens that do not fit are refused.
        multimodal: Write a mode (int8) for each sequence as well.
        dtype_codes: Who is to read the file: ``megatron`` (and everyone else), or ``deepspeed``.
    """

    def __init__(
        self,
        path_prefix: str | os.PathLike[str],
        dtype: npt.DTypeLike = np.int32,
        *,
        multimodal: bool = False,
        dtype_codes: DtypeCodes = "megatron",
    ) -> None:
        self._code = dtype_code(dtype, dtype_codes)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._bin_path, self._idx_path = bin_path(path_prefix), idx_path(path_prefix)
        self._multimodal = multimodal
        self._lengths = array("i")
        self._modes = array("b")
        self._boundaries = array("q", [0])
        self._files = ExitStack()
        self._file: IO[bytes] | None = self._files.enter_context(atomic_file(self._bin_path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        if error is None:
            self.finalize()
        else:
            self.abort()

    def __len__(self) -> int:
        """How many sequences have been added."""
        return len(self._lengths)

    def add_item(self, tokens: npt.ArrayLike, mode: int = 0) -> None:
        """Add one sequence to the open document.

        Args:
            tokens: One dimension of integers (or floats for a float dtype) that fit the dtype; may be empty.
            mode: The sequence's mode, for a multimodal dataset.

        Raises:
            ValueError: The tokens have another shape or do not fit the dtype.
        """
        self._write(self._as_tokens(tokens), lengths=None, modes=[mode])

    def add_items(self, items: Iterable[npt.ArrayLike], *, documents: bool = False) -> None:
        """Add many sequences with one write; with ``documents=True`` each is a document of its own.

        The open document, if it has sequences, is ended first when ``documents`` is set.
        """
        if documents:
            self._end_open_document()
        arrays = [self._as_tokens(item) for item in items]
        if not arrays:
            return
        first = len(self)
        self._write(np.concatenate(arrays), lengths=[len(tokens) for tokens in arrays], modes=None)
        if documents:
            self._boundaries.extend(range(first + 1, len(self) + 1))

    def add_flat(self, tokens: npt.ArrayLike, lengths: npt.NDArray[np.int64]) -> None:
        """Add many documents with one write: ``tokens`` cut into sequences of ``lengths``, each one a document.

        The open document, if it has sequences, is ended first.
        """
        self._end_open_document()
        first = len(self)
        self._write(self._as_tokens(tokens), lengths=lengths.tolist(), modes=None)
        self._boundaries.extend(range(first + 1, len(self) + 1))

    def add_document(
        self, tokens: npt.ArrayLike, lengths: Sequence[int] | None = None, modes: Sequence[int] | None = None
    ) -> None:
        """Add one whole document: ``tokens`` cut into sequences of ``lengths`` (one sequence if None).

        The open document, if it has sequences, is ended first.
        """
        self._end_open_document()
        self._write(self._as_tokens(tokens), lengths=lengths, modes=modes)
        self.end_document()

    def end_document(self) -> None:
        """End the open document; one without sequences is recorded too, as an empty document."""
        self._open_file()
        self._boundaries.append(len(self))

    def add_index(self, source: str | os.PathLike[str] | IndexedDataset) -> None:
        """Append another indexed dataset of the same dtype, with its documents.

        Args:
            source: The dataset, or its path prefix.

        Raises:
            ValueError: The other dataset has another dtype, or one has modes and the other has not.
        """
        other = source if isinstance(source, IndexedDataset) else IndexedDataset(source)
        path_prefix = other.path_prefix
        if other.dtype != self.dtype:
            raise ValueError(
                f"{path_prefix} holds {other.dtype.name}, this dataset {self.dtype.name}; "
                f"build this one with dtype={other.dtype.name}"
            )
        if len(other) and (other.modes is not None) != self._multimodal:
            raise ValueError(
                f"{path_prefix} {'has' if other.modes is not None else 'has no'} modes; "
                f"build this dataset with multimodal={other.modes is not None}"
            )
        self.add_documents(other, 0, other.num_documents)

    def add_documents(self, other: IndexedDataset, start: int, stop: int) -> None:
        """Append documents ``start`` to ``stop`` of another dataset of the same dtype and kind."""
        file = self._open_file()
        self._end_open_document()
        boundaries = other.document_indices[start : stop + 1].astype(np.int64)
        low, high, first = int(boundaries[0]), int(boundaries[-1]), len(self)
        if other.is_contiguous:
            tokens, _ = other.read_range(low, high)
            step = _COPY_BYTES // self.dtype.itemsize
            for at in range(0, len(tokens), step):
                file.write(tokens[at : at + step].tobytes())
        else:
            for number in range(low, high):
                file.write(other.get(number).tobytes())
        self._lengths.frombytes(other.lengths[low:high].astype(np.int32).tobytes())
        if other.modes is not None:
            self._modes.frombytes(other.modes[low:high].tobytes())
        self._boundaries.frombytes((boundaries[1:] - low + first).tobytes())

    def finalize(self) -> None:
        """Write the index and give both files their names; sequences after the last ``end_document`` are ended.

        An index from before is removed first, so that no moment shows an old index beside new tokens.
        """
        self._open_file()
        self._end_open_document()
        self._idx_path.unlink(missing_ok=True)
        self._file = None
        self._files.close()
        write_index(
            self._idx_path,
            self.dtype,
            self._code,
            np.frombuffer(self._lengths, dtype=np.int32),
            np.frombuffer(self._boundaries, dtype=np.int64),
            np.frombuffer(self._modes, dtype=np.int8) if self._multimodal else None,
        )

    def abort(self) -> None:
        """Give up: what was written is removed, and a dataset of that name from before stays as it was."""
        self._open_file()
        self._file = None
        try:
            with self._files:
                raise _AbandonError
        except _AbandonError:
            return

    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            raise ValueError(f"{self._bin_path}: the dataset was finalized or abandoned; nothing more can be added")
        return self._file

    def _end_open_document(self) -> None:
        if self._boundaries[-1] != len(self):
            self.end_document()

    def _as_tokens(self, tokens: npt.ArrayLike) -> npt.NDArray[Any]:
        found = np.asarray(tokens)
        if found.ndim != 1:
            raise ValueError(f"a sequence has one dimension of tokens, got the shape {found.shape}")
        if found.dtype == self.dtype or found.size == 0:
            return found.astype(self.dtype, copy=False)
        if self.dtype.kind == "f":
            if found.dtype.kind not in "iuf":
                raise ValueError(f"tokens of {found.dtype} cannot be stored as {self.dtype.name}")
            return found.astype(self.dtype)
        if found.dtype.kind not in "iu":
            raise ValueError(f"tokens of {found.dtype} cannot be stored as {self.dtype.name}; give integers")
        limits, low, high = np.iinfo(self.dtype), int(found.min()), int(found.max())
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"tokens run from {low} to {high}, but {self.dtype.name} holds {limits.min} to {limits.max}; "
                f"build the dataset with a wider dtype"
            )
        return found.astype(self.dtype)

    def _write(self, tokens: npt.NDArray[Any], *, lengths: Sequence[int] | None, modes: Sequence[int] | None) -> None:
        file = self._open_file()
        counts = [len(tokens)] if lengths is None else [int(length) for length in lengths]
        if counts and not (min(counts) >= 0 and max(counts) <= MAX_LENGTH):
            raise ValueError(f"a sequence has 0 to {MAX_LENGTH} tokens, got {min(counts)} to {max(counts)}")
        if sum(counts) != len(tokens):
            raise ValueError(f"the lengths add up to {sum(counts)}, but there are {len(tokens)} tokens")
        if self._multimodal:
            given = [0] * len(counts) if modes is None else [int(mode) for mode in modes]
            if len(given) != len(counts) or any(not -128 <= mode <= 127 for mode in given):
                raise ValueError(f"{len(counts)} sequences need {len(counts)} modes in -128..127, got {given}")
            self._modes.extend(given)
        elif modes is not None and any(modes):
            raise ValueError("modes were given; build the dataset with multimodal=True to store them")
        file.write(np.ascontiguousarray(tokens).tobytes())
        self._lengths.extend(counts)


def write_index(
    path: Path,
    dtype: np.dtype[Any],
    code: int,
    lengths: npt.NDArray[np.int32],
    boundaries: npt.NDArray[np.int64] | None,
    modes: npt.NDArray[np.int8] | None = None,
) -> None:
    """Write the ``.idx`` file of sequences that lie one after another, in bounded memory beside the arguments.

    Args:
        path: The file, which appears whole or not at all.
        dtype: Of the tokens.
        code: What stands for the dtype.
        lengths: Tokens of each sequence.
        boundaries: Sequence numbers at which documents begin, and the end of the last; None: each is a document.
        modes: Of each sequence; None where the dataset has none.
    """
    count = len(lengths)
    marks = count + 1 if boundaries is None else len(boundaries)
    with atomic_file(path) as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, count, marks))
        for start in range(0, count, _INDEX_CHUNK):
            file.write(lengths[start : start + _INDEX_CHUNK].astype("<i4").tobytes())
        end = 0
        for start in range(0, count, _INDEX_CHUNK):
            sizes = lengths[start : start + _INDEX_CHUNK].astype(np.int64) * dtype.itemsize
            ends = end + np.cumsum(sizes)
            file.write((ends - sizes).astype("<i8").tobytes())
            end = int(ends[-1])
        for start in range(0, marks, _INDEX_CHUNK):
            stop = min(start + _INDEX_CHUNK, marks)
            part = np.arange(start, stop) if boundaries is None else boundaries[start:stop]
            file.write(part.astype("<i8").tobytes())
        if modes is not None:
            file.write(modes.tobytes())
