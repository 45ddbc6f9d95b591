"""Token sequences in Megatron-Core's ``.bin``/``.idx`` pair, memory-mapped.

``PREFIX.bin`` holds the tokens of all sequences, one after another. ``PREFIX.idx`` says where they lie, little-endian
throughout::

    bytes 0-8    magic b"MMIDIDX\\x00\\x00"
    u64          version, 1
    u8           dtype code of the tokens (see indexed_dtypes)
    u64          number of sequences, S
    u64          number of document boundaries, D
    S x int32    length of each sequence, in tokens
    S x int64    where each sequence starts in the .bin file, in bytes
    D x int64    document boundaries as sequence numbers: 0, ..., S
    S x int8     mode of each sequence (only in multimodal files)

Nothing in these files is believed before it is checked against their sizes, so a damaged index raises
:class:`CorruptFileError` when it is opened and never reads outside the file or allocates what the header claims.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from penstock._core.files import CorruptFileError
from penstock.data_pipeline.datasets.indexed_dtypes import CODES, DtypeCodes, check_dtype_codes, doubts
from penstock.data_pipeline.datasets.remote import fetch_pair, is_remote

MAGIC: Final = b"MMIDIDX\x00\x00"
VERSION: Final = 1
HEADER: Final = struct.Struct("<9sQBQQ")

_CHECK_CHUNK: Final = 1 << 20


def bin_path(path_prefix: str | os.PathLike[str]) -> Path:
    """The file that holds the tokens of the dataset ``path_prefix`` (the prefix, or either file's path)."""
    return Path(_stem(path_prefix) + ".bin")


def idx_path(path_prefix: str | os.PathLike[str]) -> Path:
    """The file that holds the index of the dataset ``path_prefix`` (the prefix, or either file's path)."""
    return Path(_stem(path_prefix) + ".idx")


def _stem(path_prefix: str | os.PathLike[str]) -> str:
    text = os.fspath(path_prefix)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


class IndexedDataset(Sequence[npt.NDArray[Any]]):
    """Read-only sequences of tokens from a ``.bin``/``.idx`` pair.

    ``dataset[i]`` and :meth:`get` return fresh arrays, which a caller may change; :attr:`tokens` and
    :meth:`read_range` give read-only views of the file. A copy made for another process (by a DataLoader's workers,
    for example) opens the files again and carries no tokens.

    Args:
        path_prefix: The common part of the two paths; either file's own path will do. A URL is fetched first.
        mmap: Map the files into memory (the default), or read them whole.
        check_entries: Check every entry of the index on opening, one pass over the ``.idx`` file. Without it only the
            header and the sizes are checked on opening, and each sequence when it is read.
        dtype_codes: Who wrote the file: ``megatron`` or ``deepspeed``, whose codes 6 to 8 stand for other dtypes. None
            reads Megatron's, and refuses a file that may be DeepSpeed's.

    Raises:
        CorruptFileError: A file is missing, cut short or inconsistent; the message names the file and the numbers.
        ValueError: It is in doubt who wrote the file.
    """

    def __init__(
        self,
        path_prefix: str | os.PathLike[str],
        *,
        mmap: bool = True,
        check_entries: bool = True,
        dtype_codes: DtypeCodes | None = None,
    ) -> None:
        check_dtype_codes(dtype_codes)
        if is_remote(path_prefix):
            path_prefix = fetch_pair(os.fspath(path_prefix))
        self.path_prefix = _stem(path_prefix)
        self._mmap = mmap
        self._idx_path, self._bin_path = idx_path(path_prefix), bin_path(path_prefix)
        for path in (self._idx_path, self._bin_path):
            if not path.is_file():
                raise CorruptFileError(f"{path}: the file is missing; an indexed dataset is a .bin and an .idx file")
        index = _bytes_of(self._idx_path, mmap=mmap)
        code, sequences, documents, has_modes = self._read_header(index)
        data = _bytes_of(self._bin_path, mmap=mmap)
        self._bin_bytes = data.size
        self._data = data

        at = HEADER.size
        # The arrays start at odd addresses (the header has 34 bytes); numpy reads unaligned views correctly.
        self._lengths = np.frombuffer(index, "<i4", sequences, at)
        self._pointers = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        self._document_indices = np.frombuffer(index, "<i8", documents, at + 12 * sequences)
        self._modes = np.frombuffer(index, "<i1", sequences, at + 12 * sequences + 8 * documents) if has_modes else None
        doubt = doubts(code, self._lengths, self._pointers, data) if dtype_codes is None else None
        if doubt is not None:
            raise ValueError(f"{self._idx_path}: {doubt}")
        self._dtype_codes: DtypeCodes = dtype_codes or "megatron"
        self.dtype = CODES[self._dtype_codes][code]
        self._contiguous: bool | None = None
        if check_entries:
            self._contiguous = self._check_sequences()
            self._check_documents()

    def _read_header(self, index: npt.NDArray[np.uint8]) -> tuple[int, int, int, bool]:
        path = self._idx_path
        if index.size < HEADER.size:
            raise CorruptFileError(f"{path}: {index.size} bytes, but the header alone has {HEADER.size}")
        magic, version, code, sequences, documents = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise CorruptFileError(f"{path}: not an indexed dataset (starts with {magic!r}, expected {MAGIC!r})")
        if version != VERSION:
            raise CorruptFileError(f"{path}: format version {version}, but only version {VERSION} is known")
        if code not in CODES["megatron"]:
            known = ", ".join(f"{key} ({value.name})" for key, value in CODES["megatron"].items())
            raise CorruptFileError(f"{path}: unknown dtype code {code}; known: {known}")
        plain = HEADER.size + 12 * sequences + 8 * documents
        if index.size not in (plain, plain + sequences):
            raise CorruptFileError(
                f"{path}: {index.size} bytes, but {sequences} sequences and {documents} document boundaries take "
                f"{plain} (or {plain + sequences} with modes); the file was cut short or altered"
            )
        if documents < 1:
            raise CorruptFileError(f"{path}: no document boundaries; there must be at least the first, 0")
        return code, sequences, documents, sequences > 0 and index.size != plain

    def _check_sequences(self) -> bool:
        """Check that each sequence lies inside the ``.bin`` file; returns whether they lie one after another."""
        width = self.dtype.itemsize
        contiguous, expected = True, 0
        for start in range(0, len(self), _CHECK_CHUNK):
            lengths = self._lengths[start : start + _CHECK_CHUNK].astype(np.int64)
            pointers = self._pointers[start : start + _CHECK_CHUNK].astype(np.int64)
            # A length is below 2**31, so only the subtraction's left side could overflow, and it is checked first.
            bad = (lengths < 0) | (pointers < 0) | (pointers % width != 0)
            bad |= pointers > self._bin_bytes - lengths * width
            if bad.any():
                self._refuse_sequence(start + int(bad.argmax()))
            ends = expected + np.cumsum(lengths * width)
            contiguous = contiguous and bool((pointers == ends - lengths * width).all())
            expected = int(ends[-1])
        return contiguous

    def _refuse_sequence(self, index: int) -> None:
        raise CorruptFileError(
            f"{self._idx_path}: sequence {index} claims {int(self._lengths[index])} tokens of "
            f"{self.dtype.itemsize} bytes at byte {int(self._pointers[index])}, but {self._bin_path} has "
            f"{self._bin_bytes} bytes"
        )

    def _check_documents(self) -> None:
        boundaries = self._document_indices
        if int(boundaries[0]) != 0 or int(boundaries[-1]) != len(self):
            raise CorruptFileError(
                f"{self._idx_path}: document boundaries run from {int(boundaries[0])} to {int(boundaries[-1])}, "
                f"but must run from 0 to the number of sequences, {len(self)}"
            )
        for start in range(0, len(boundaries) - 1, _CHECK_CHUNK):
            part = boundaries[start : start + _CHECK_CHUNK + 1]
            falls = part[1:] < part[:-1]
            if falls.any():
                at = start + int(falls.argmax())
                raise CorruptFileError(
                    f"{self._idx_path}: document boundary {at + 1} ({int(boundaries[at + 1])}) lies before "
                    f"boundary {at} ({int(boundaries[at])})"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        # A checked index is not checked again by every worker and every task that is given a copy.
        return _reopen, (self.path_prefix, self._mmap, self._contiguous, self._dtype_codes)

    def __repr__(self) -> str:
        return f"IndexedDataset({self.path_prefix!r}, {len(self)} sequences, {self.dtype.name})"

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens in each sequence, int32; a read-only view of the file."""
        return self._lengths

    @property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """Document ``d`` is made of sequences ``document_indices[d]`` to ``document_indices[d + 1]``; int64 view."""
        return self._document_indices

    @property
    def modes(self) -> npt.NDArray[np.int8] | None:
        """Mode of each sequence in a multimodal file, int8; None where the file has none."""
        return self._modes

    @property
    def num_documents(self) -> int:
        """How many documents the sequences make up."""
        return len(self._document_indices) - 1

    @property
    def is_contiguous(self) -> bool:
        """Whether the sequences lie one after another from the start of the ``.bin`` file, as every builder writes."""
        if self._contiguous is None:
            self._contiguous = self._check_sequences()
        return self._contiguous

    @property
    def num_tokens(self) -> int:
        """How many tokens the ``.bin`` file holds."""
        return self._bin_bytes // self.dtype.itemsize

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """The whole ``.bin`` file as one read-only array: the concatenated stream where :attr:`is_contiguous`."""
        return np.frombuffer(self._data, self.dtype, self.num_tokens)

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[npt.NDArray[Any]]: ...
    def __getitem__(self, index: int | slice) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(len(self)))]
        return self.get(index)

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (self.get(index) for index in range(len(self)))

    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Part of one sequence, as a fresh array.

        Args:
            index: Which sequence; negative counts from the end.
            offset: First token of the part.
            length: How many tokens; to the sequence's end if None.

        Raises:
            IndexError: There is no such sequence.
            ValueError: The part does not lie inside the sequence.
            CorruptFileError: The index places the sequence outside the ``.bin`` file.
        """
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"sequence {i} of {self.path_prefix}, which has {len(self)}")
        i %= len(self)
        size, pointer = int(self._lengths[i]), int(self._pointers[i])
        if size < 0 or pointer < 0 or pointer + size * self.dtype.itemsize > self._bin_bytes:
            self._refuse_sequence(i)
        count = size - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > size:
            raise ValueError(f"tokens {offset} to {offset + count} of sequence {i}, which has {size} tokens")
        start = pointer + offset * self.dtype.itemsize
        return np.frombuffer(self._data, self.dtype, count, start).copy()

    def read_range(self, start: int, stop: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Sequences ``start`` to ``stop`` as flat tokens and offsets, for work on many sequences at once.

        Returns:
            ``(tokens, offsets)``: sequence ``start + i`` is ``tokens[offsets[i]:offsets[i + 1]]``; offsets are int64,
            one more than there are sequences. Where :attr:`is_contiguous`, the tokens are a view of the file.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"sequences {start} to {stop} of {self.path_prefix}, which has {len(self)}")
        offsets = np.zeros(stop - start + 1, dtype=np.int64)
        np.cumsum(self._lengths[start:stop], out=offsets[1:])
        if start == stop:
            return np.empty(0, self.dtype), offsets
        if self.is_contiguous:
            return np.frombuffer(self._data, self.dtype, int(offsets[-1]), int(self._pointers[start])), offsets
        return np.concatenate([self.get(i) for i in range(start, stop)]), offsets


def _reopen(path_prefix: str, mmap: bool, contiguous: bool | None, dtype_codes: DtypeCodes) -> IndexedDataset:
    dataset = IndexedDataset(path_prefix, mmap=mmap, check_entries=False, dtype_codes=dtype_codes)
    dataset._contiguous = contiguous
    return dataset


def _bytes_of(path: Path, *, mmap: bool) -> npt.NDArray[np.uint8]:
    """A file's bytes, read-only; an empty file (which cannot be mapped) gives an empty array."""
    if path.stat().st_size == 0:
        data = np.empty(0, dtype=np.uint8)
    elif mmap:
        # A plain array over the map: memmap's own subclass makes every slice ten times as dear.
        data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    else:
        data = np.fromfile(path, dtype=np.uint8)
    data.flags.writeable = False
    return data
