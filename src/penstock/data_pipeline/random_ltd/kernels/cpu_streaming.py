"""Copying whole tokens past the caches, compiled by Numba (the extra ``numba``) when it is first needed.

A store reads its cache line before it changes it. Of a line that is overwritten as a whole nothing of that is used, but
it is a third of the traffic. A large ``memcpy`` therefore writes past the caches, but a token is too short for it to do
so. Here tokens are copied past the caches one by one, and eight side by side: the processor's own prefetching ends
with a page of memory, which is a token or a few, and only several places that are read at once keep the memory busy.

The threads are torch's own: others would share the cores with them, which wait for their next work by spinning. Each
takes a few tokens at a time until none is left, so that one which is held up does not hold up the rest.
"""

from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from penstock.data_pipeline.random_ltd.kernels.torch_threads import run_on_torch_threads

_LINE: Final = 64
_ABREAST: Final = 8
_SHARE: Final = 1 << 18
"""Bytes that a thread takes at a time: tens of microseconds, and a few hundred shares of a large output."""

_BYTE, _WORD, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
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
def _number_at(_context, _address):
    """The int64 at an address."""

    def emit(_, builder, __, addresses):
        return builder.load(builder.inttoptr(addresses[0], _LONG.as_pointer()))

    return numba.int64(numba.intp), emit


@_emitted
def _add_at(_context, _address, _more):
    """Add to the int64 at an address and return what it was, undivided by what other threads do."""

    def emit(_, builder, __, arguments):
        address, more = arguments
        return builder.atomic_rmw("add", builder.inttoptr(address, _LONG.as_pointer()), more, "monotonic")

    return numba.int64(numba.intp, numba.int64), emit


@_emitted
def _fence(_context):
    """What was written past the caches is seen by other threads before anything that follows."""

    def emit(_, builder, __, ___):
        builder.fence("seq_cst")

    return numba.void(), emit


@numba.njit("void(intp, intp, intp, intp, intp)", cache=True)
def _copy_some(target, sources, size, begin, end):
    """Tokens ``begin`` to ``end``; of each, the lines past the caches, and what lies before and after as usual."""
    aligned = target % _LINE == 0 and size % _LINE == 0
    lines = size // _LINE if aligned else (size - _LINE + 1) // _LINE
    for first in range(begin, end, _ABREAST):
        # Where fewer than eight are left, the last is copied again and again, by this thread alone.
        for one in range(_ABREAST):
            token = min(first + one, end - 1)
            to = target + token * size
            _copy_bytes(to, _number_at(sources + 8 * token), -to % _LINE)
        for at in range(0, lines * _LINE, _LINE):
            for one in range(_ABREAST):
                token = min(first + one, end - 1)
                to = target + token * size
                before = -to % _LINE
                _stream_line(to + before + at, _number_at(sources + 8 * token) + before + at)
        for one in range(_ABREAST):
            token = min(first + one, end - 1)
            to = target + token * size
            done = -to % _LINE + lines * _LINE
            _copy_bytes(to + done, _number_at(sources + 8 * token) + done, size - done)
    _fence()


@numba.cfunc("void(intp)", cache=True)
def _take_shares(job):
    """What each thread does; ``job`` is the address of the numbers that :func:`copy_tokens` lists."""
    target, sources, size = _number_at(job + 8), _number_at(job + 16), _number_at(job + 24)
    count, share = _number_at(job + 32), _number_at(job + 40)
    begin = _add_at(job, share)
    while begin < count:
        _copy_some(target, sources, size, begin, min(begin + share, count))
        begin = _add_at(job, share)


def copy_tokens(sources: npt.NDArray[np.int64], out: Tensor) -> None:
    """Copy tokens beside each other, on as many threads as torch uses; returns when all are copied.

    Args:
        sources: Address of each token of the output, in its order; contiguous.
        out: Contiguous; ``len(sources)`` tokens of at least a line (64 bytes).
    """
    count, size = len(sources), out.nbytes // len(sources)
    share = max(1, _SHARE // (size * _ABREAST)) * _ABREAST
    next_token = 0
    job = np.array([next_token, out.data_ptr(), sources.ctypes.data, size, count, share], dtype=np.int64)
    function = _take_shares.address
    assert function is not None  # compiled when it was decorated
    run_on_torch_threads(function, job.ctypes.data, most=-(-count // share))
