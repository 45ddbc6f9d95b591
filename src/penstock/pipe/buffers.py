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
from torch import Tensor

ALIGNMENT: Final = 64
"""Bytes. Unaligned matrices change the bits of a product, so tensors in a buffer start at multiples of this."""

Bytes = npt.NDArray[np.uint8]


class _Loan(np.ndarray[Any, np.dtype[np.uint8]]):
    """A view of a pooled array that a torch storage keeps alive; its end gives the array back."""

    lent: tuple[Bytes, deque[Bytes]] | None

    def __array_finalize__(self, source: Any) -> None:
        self.lent = None

    def __del__(self) -> None:
        if self.lent is not None:
            array, home = self.lent
            home.append(array)


class BufferPool:
    """Lends byte buffers of one size; the size only grows.

    Fresh memory costs page faults, so buffers are used again, most recently used first. One thread takes buffers; they
    may come back on any.

    Attributes:
        nbytes: Size of the buffers lent now.
        made: How many buffers were allocated so far.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.made = 0
        self._free: deque[Bytes] = deque()

    def take(self, nbytes: int) -> Tensor:
        """A uint8 tensor of at least ``nbytes``, starting at a multiple of 64 bytes; contents are arbitrary."""
        if nbytes > self.nbytes:
            self.nbytes = round_up(nbytes)
        while self._free:
            array = self._free.pop()
            if array.nbytes == self.nbytes:
                return self._lend(array)
        self.made += 1
        return self._lend(_fresh(self.nbytes))

    def _lend(self, array: Bytes) -> Tensor:
        loan = array.view(_Loan)
        loan.lent = (array, self._free)
        return torch.frombuffer(loan, dtype=torch.uint8)


def round_up(nbytes: int) -> int:
    """The capacity that holds ``nbytes``: a power of two, at least 4 KiB. Pages that are not touched cost nothing."""
    return max(4096, 1 << (nbytes - 1).bit_length())


def _fresh(nbytes: int) -> Bytes:
    array = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -array.ctypes.data % ALIGNMENT
    return array[start : start + nbytes]
