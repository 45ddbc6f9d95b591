"""Byte buffers that return to their pool by themselves.

A received activation is a view into the buffer it arrived in, and autograd, a layer's cache or a parameter's first
gradient may keep such a view for longer than the engine can know. So a buffer is not handed back by whoever took it:
it comes back when the last tensor that looks into it is gone.
"""

from collections import deque
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT: Final = 64
"""Bytes. Unaligned matrices change the bits of a product, so tensors in a buffer start at multiples of this."""

Bytes = npt.NDArray[np.uint8]


class Buffer:
    """Memory in all the forms that it is used in.

    Attributes:
        array: The bytes, from a multiple of 64 on.
        tensor: The same as a uint8 tensor.
        memory: The same as a memoryview.
    """

    __slots__ = ("array", "memory", "tensor")

    def __init__(self, nbytes: int) -> None:
        array = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
        start = -array.ctypes.data % ALIGNMENT
        self.array: Bytes = array[start : start + nbytes]
        self.tensor = torch.from_numpy(self.array)
        self.memory = self.array.data

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.array.nbytes


class _Loan(np.ndarray[Any, np.dtype[np.uint8]]):
    """A view of a buffer's array that torch storages keep alive; its end gives the buffer back."""

    lent: tuple[Buffer, deque[Buffer]] | None

    def __array_finalize__(self, source: Any) -> None:
        self.lent = None

    def __del__(self) -> None:
        if self.lent is not None:
            buffer, home = self.lent
            home.append(buffer)


class BufferPool:
    """Buffers of one size at a time: the last one asked for. Buffers of another size are let go as they come back.

    Fresh memory costs page faults, so buffers are used again, most recently used first. One thread takes buffers; they
    may come back on any.

    Attributes:
        made: How many buffers were allocated so far.
    """

    def __init__(self) -> None:
        self.made = 0
        self._free: deque[Buffer] = deque()

    def take(self, nbytes: int) -> Buffer:
        """A buffer of exactly ``nbytes``; contents are arbitrary."""
        while self._free:
            buffer = self._free.pop()
            if buffer.nbytes == nbytes:
                return buffer
        self.made += 1
        return Buffer(nbytes)

    def give(self, buffer: Buffer) -> None:
        """Give a buffer back that was taken, and not lent."""
        self._free.append(buffer)

    def lend(self, buffer: Buffer) -> Bytes:
        """The array of a buffer for others to look into; the buffer is free when the last view of it is gone."""
        loan = buffer.array.view(_Loan)
        loan.lent = (buffer, self._free)
        return loan


def round_up(nbytes: int) -> int:
    """The capacity that holds ``nbytes``: a power of two, at least 4 KiB. Pages that are not touched cost nothing."""
    return max(4096, 1 << (nbytes - 1).bit_length())
