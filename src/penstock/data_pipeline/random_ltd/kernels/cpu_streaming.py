"""Copying whole tokens past the caches, compiled by Numba (the extra ``numba``) when it is first needed.

A store reads its cache line before it changes it. Of a line that is overwritten as a whole nothing of that is used, but
it is a third of the traffic. A large ``memcpy`` therefore writes past the caches, but a token is too short for it to do
so. Here tokens are copied past the caches one by one, and eight side by side: the processor's own prefetching ends
with a page of memory, which is a token or a few, and only several places that are read at once keep the memory busy.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

_LINE: Final = 64
_ABREAST: Final = 8
_SHARE: Final = 1 << 22
"""Bytes that are worth a thread: tens of microseconds to wake it, hundreds to copy them."""

_BYTE, _WORD = ir.IntType(8), ir.IntType(32)
_emitted: Any = intrinsic  # typed as a function of the context too, which the compiler passes


@_emitted
def _stream_line(_context, _target, _source):
    """Copy a line from any address to the address of a line, past the caches."""

    def emit(_, builder, __, addresses):
        line = ir.VectorType(_WORD, _LINE // 4).as_pointer()
        target, source = (builder.inttoptr(address, line) for address in addresses)
        store = builder.store(builder.load(source, align=1), target, align=_LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_WORD, 1)]))

    return numba.void(numba.intp, numba.intp), emit


@_emitted
def _copy_bytes(_context, _target, _source, _count):
    """``memcpy``."""

    def emit(_, builder, __, arguments):
        target, source, count = arguments
        byte = _BYTE.as_pointer()
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [byte, byte, count.type])
        volatile = ir.Constant(ir.IntType(1), 0)
        builder.call(memcpy, [builder.inttoptr(target, byte), builder.inttoptr(source, byte), count, volatile])

    return numba.void(numba.intp, numba.intp, numba.intp), emit


@_emitted
def _fence(_context):
    """What was written past the caches is seen by other threads before anything that follows."""

    def emit(_, builder, __, ___):
        builder.fence("seq_cst")

    return numba.void(), emit


@numba.njit("void(intp, int64[::1], intp, intp, intp)", cache=True, nogil=True)
def _copy_some(target, sources, size, begin, end):
    """Tokens ``begin`` to ``end``; of each, the lines past the caches, and what lies before and after as usual."""
    aligned = target % _LINE == 0 and size % _LINE == 0
    lines = size // _LINE if aligned else (size - _LINE + 1) // _LINE
    for first in range(begin, end, _ABREAST):
        # Where fewer than eight are left, the last is copied again and again, by this thread alone.
        for one in range(_ABREAST):
            token = min(first + one, end - 1)
            to = target + token * size
            _copy_bytes(to, sources[token], -to % _LINE)
        for at in range(0, lines * _LINE, _LINE):
            for one in range(_ABREAST):
                token = min(first + one, end - 1)
                to = target + token * size
                before = -to % _LINE
                _stream_line(to + before + at, sources[token] + before + at)
        for one in range(_ABREAST):
            token = min(first + one, end - 1)
            to = target + token * size
            done = -to % _LINE + lines * _LINE
            _copy_bytes(to + done, sources[token] + done, size - done)
    _fence()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="penstock-copy")


os.register_at_fork(after_in_child=_pool.cache_clear)  # its threads have stayed in the parent


def copy_tokens(tokens: tuple[Tensor, ...], sources: npt.NDArray[np.int64], out: Tensor) -> None:
    """Copy tokens beside each other, on as many threads as torch uses.

    Args:
        tokens: Where they lie; kept in memory until the last thread is done.
        sources: Address of each token of the output, in its order.
        out: Contiguous; ``len(sources)`` tokens of at least a line (64 bytes).
    """
    count, size = len(sources), out.nbytes // len(sources)
    threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1, out.nbytes // _SHARE))
    (_, first), *others = pairwise(count * thread // threads for thread in range(threads + 1))
    pending = [_pool().submit(_copy_between, tokens, sources, out, *between) for between in others]
    _copy_some(out.data_ptr(), sources, size, 0, first)
    for part in pending:
        part.result()


def _copy_between(
    tokens: tuple[Tensor, ...], sources: npt.NDArray[np.int64], out: Tensor, begin: int, end: int
) -> None:
    # Holding the tensors: whoever waits may be interrupted and let go of them while this still writes.
    _copy_some(out.data_ptr(), sources, out.nbytes // len(sources), begin, end)
