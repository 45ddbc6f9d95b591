"""Moving tokens on the CPU: every output is written once, every token read once.

By torch's indexing, an output that mixes the tokens of two tensors takes two passes: all of the one, then the other's
tokens over it. Here a table says for every token of the output at which *address* it lies, whichever tensor that is in,
and they are copied from there: past the caches where that pays and Numba is installed
(:mod:`penstock.data_pipeline.random_ltd.kernels.cpu_streaming`), else by one ``index_select`` over the stretch of
memory that spans the tensors. Only the addresses in the table are read, and those lie inside the tensors, whatever
their strides.

Below :data:`LARGE` bytes the table costs more than the second pass, and torch's indexing is used. So it is for adding:
two passes there, but no more memory.

Writing to fresh memory costs several times the copy in page faults. NumPy asks for huge pages, which torch does only on
request, so large outputs are NumPy's memory.
"""

import ctypes
import importlib.util
import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from penstock.data_pipeline.random_ltd.kernels.shapes import batch_and_length, with_length
from penstock.data_pipeline.random_ltd.kernels.torch_threads import has_torch_threads

LARGE: Final = 1 << 22
STREAMED: Final = 1 << 24
"""Bytes from which an output is written past the caches: smaller ones are still there when they are read next."""
_LONG: Final = 1024
"""Bytes of a token from which that pays."""
_MOST_VALUES: Final = 1 << 62  # torch counts a tensor's values in 64 bits, those of overlapping rows many times
_ALIGNMENT: Final = 64
_WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def gather(x: Tensor, indices_BK: Tensor, batch_first: bool) -> Tensor:
    """The tokens of ``x`` at the indices; the arguments as in :func:`penstock.data_pipeline.random_ltd.ops.gather`."""
    out = _fresh(with_length(x.shape, indices_BK.shape[1], batch_first), x.dtype)
    if out.numel():
        tokens = _words(x)
        _copy((tokens,), _places(tokens, indices_BK.long(), batch_first), out, batch_first)
    return out


def combine(
    x: Tensor | None, y: Tensor | None, indices_BK: Tensor, length: int, batch_first: bool, add: bool
) -> Tensor:
    """``y``'s tokens among ``x``'s; the arguments as in :func:`penstock.data_pipeline.random_ltd.ops.combine`."""
    like = x if x is not None else y
    assert like is not None
    shape = with_length(like.shape, length, batch_first)
    out = _fresh(shape, like.dtype)
    if add or out.nbytes < LARGE:
        return _in_two_passes(x, y, indices_BK, out, batch_first, add)
    zero = like.new_zeros(1, 1, *shape[2:])  # stands for each token of a missing tensor
    passing, others = _words(zero if x is None else x), _words(zero if y is None else y)
    begin, end = _span(passing, others)
    if (end - begin) * passing.shape[2] >= _MOST_VALUES:
        return _in_two_passes(x, y, indices_BK, out, batch_first, add)
    at_BS = _all_places(passing, batch_first).expand(indices_BK.shape[0], length).contiguous()
    at_BS.scatter_(1, indices_BK.long(), _all_places(others, batch_first).expand(indices_BK.shape))
    _copy((passing, others), at_BS, out, batch_first)
    return out


def _in_two_passes(
    x: Tensor | None, y: Tensor | None, indices_BK: Tensor, out: Tensor, batch_first: bool, add: bool
) -> Tensor:
    out = out.zero_() if x is None else out.copy_(x)
    rows, at = out.flatten(0, 1), _flat_rows(indices_BK, out.shape, batch_first)
    if y is None:
        rows.index_fill_(0, at, 0)
    elif add:
        rows.index_add_(0, at, y.flatten(0, 1))
    else:
        words = _words(out).flatten(0, 1)  # some dtypes cannot be indexed
        words.index_copy_(0, at, _words(y).flatten(0, 1))
    return out


def _flat_rows(indices_BK: Tensor, shape: Sequence[int], batch_first: bool) -> Tensor:
    """Where the tokens lie when the first two dimensions of ``shape`` are one; int64 ``[B * K]`` in ``y``'s order."""
    at = indices_BK.long()
    row = torch.arange(at.shape[0]).unsqueeze(1)
    return (row * shape[1] + at).flatten() if batch_first else (at * shape[1] + row).t().flatten()


def _words(x: Tensor) -> Tensor:
    """``[B, S, ...]`` as integers ``[B, S, W]`` that lie beside each other within a token."""
    tokens = x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    words = tokens.view(_WORDS[x.element_size()])
    # Addresses are counted in words: what lies between two of them (in a file mapped into memory, say) is moved.
    return words.clone() if words.data_ptr() % words.element_size() else words


def _places(tokens: Tensor, indices_BK: Tensor, batch_first: bool) -> Tensor:
    """At which addresses the tokens at the indices begin, counted in words; int64 ``[B, K]``."""
    per_row, per_token = tokens.stride()[:2] if batch_first else tokens.stride()[1::-1]
    batch, _ = batch_and_length(tokens.shape, batch_first)
    rows_B = torch.arange(batch) * per_row + _address(tokens)
    return torch.add(rows_B.unsqueeze(1), indices_BK, alpha=per_token)


def _all_places(tokens: Tensor, batch_first: bool) -> Tensor:
    _, length = batch_and_length(tokens.shape, batch_first)
    return _places(tokens, torch.arange(length), batch_first)


def _address(tokens: Tensor) -> int:
    return tokens.data_ptr() // tokens.element_size()


def _span(*tensors: Tensor) -> tuple[int, int]:
    """The words between which all tensors lie."""
    some = [tokens for tokens in tensors if tokens.numel()]
    return min(map(_address, some)), max(_address(tokens) + _extent(tokens) for tokens in some)


def _copy(tensors: tuple[Tensor, ...], at_BS: Tensor, out: Tensor, batch_first: bool) -> None:
    """Fill ``out`` with the tokens that begin at these addresses in the tensors."""
    at = (at_BS if batch_first else at_BS.t()).flatten()
    word, width = tensors[0].element_size(), tensors[0].shape[2]
    if out.nbytes >= STREAMED and width * word >= _LONG and _can_stream():
        from penstock.data_pipeline.random_ltd.kernels import cpu_streaming

        return cpu_streaming.copy_tokens((at * word).numpy(), out)
    begin, end = _span(*tensors)
    memory = (ctypes.c_char * ((end - begin) * word)).from_address(begin * word)
    # What a token would be that began at any word: overlapping rows, read only where there are some.
    every_token = torch.frombuffer(memory, dtype=tensors[0].dtype).as_strided((end - begin - width + 1, width), (1, 1))
    torch.index_select(every_token, 0, at - begin, out=out.view(-1).view(every_token.dtype).view(at.numel(), -1))
    return None


@cache
def _can_stream() -> bool:
    if importlib.util.find_spec("numba") is None or not has_torch_threads():
        return False
    try:
        importlib.import_module("penstock.data_pipeline.random_ltd.kernels.cpu_streaming")
    except (ImportError, RuntimeError) as error:  # numba is of another numpy, or has no folder to keep its code in
        warnings.warn(f"large tensors are copied without numba, which cannot be used here: {error}", stacklevel=2)
        return False
    return True


def _extent(tokens: Tensor) -> int:
    """Words from the first to the last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tokens.shape, tokens.stride(), strict=True))


def _fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor, in huge pages if it is large."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(*shape, dtype=dtype)
    memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    # Aligned as torch's own memory is: some products give other bits on unaligned operands.
    skip = -memory.ctypes.data % _ALIGNMENT
    # Autograd refuses to have a view changed in place that an operator gave out; .data is not one.
    return torch.from_numpy(memory[skip : skip + size]).view(dtype).view(*shape).data
