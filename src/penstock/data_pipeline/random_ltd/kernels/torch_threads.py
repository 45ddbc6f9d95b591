"""Running compiled code on the threads on which torch's own operators run.

They belong to the OpenMP runtime that torch is linked to, whose entry for a parallel region (``GOMP_parallel``; libgomp
has it and, for compatibility, LLVM's) is called as compilers call it.
"""

import ctypes
import os
from functools import cache
from typing import Any

import torch

_process = os.getpid()


@cache
def _parallel_region() -> Any:
    """The runtime's entry; None where torch has no OpenMP, or one that is called in another way."""
    try:
        # The symbol is looked up in torch's extension and all libraries that it needs.
        entry = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    entry.restype = None
    return entry


def has_torch_threads() -> bool:
    """Whether :func:`run_on_torch_threads` can be called."""
    return _parallel_region() is not None


def run_on_torch_threads(function: int, argument: int, *, most: int) -> None:
    """Call a compiled function on several threads at once, this one among them; returns when the last has returned.

    Args:
        function: Address of a C function that takes one pointer, needs no lock of the interpreter, and shares the work
            out by itself: it may be called on fewer threads than asked for.
        argument: The pointer.
        most: Threads at most; no more than torch uses are called.
    """
    # In a forked process the runtime would wait for threads that have stayed in the parent.
    threads = min(torch.get_num_threads(), most) if os.getpid() == _process else 1
    if threads > 1:
        no_flags = 0
        _parallel_region()(function, argument, threads, no_flags)
    else:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
