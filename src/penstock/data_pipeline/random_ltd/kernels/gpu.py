# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Moving tokens on CUDA GPUs: Triton kernels that write every output once and read every token once.

A program copies a tile of a few tokens times a stretch of their width. For :func:`combine` a table says for every token
of the output which of ``y``'s tokens goes there, if any (:func:`_inverse`); so indices need not be sorted, and the
table is all that is written beside the output.

Values are moved as integers of their size, so that every dtype takes the same path bit by bit; only addition looks at
them as numbers. Strides are arguments: nothing is copied to make it contiguous first.

An index outside its row fails an assertion on the device: the kernel's in :func:`gather`, torch's ``scatter_`` in
:func:`combine`.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.data_pipeline.random_ltd.kernels.shapes import with_length

_TILE_BYTES: Final = 8192
_SUM_TYPES: Final = {
    torch.float16: tl.float32, torch.bfloat16: tl.float32, torch.float32: tl.float32, torch.float64: tl.float64,
}  # fmt: skip
_WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(debug=True)  # for the assertion
def _gather_kernel(
    x, indices, out, tokens, kept, length, width,
    x_row, x_token, x_word, out_row, out_token, indices_row, indices_token,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < tokens
    row, at = token // kept, token % kept
    source = tl.load(indices + row * indices_row + at * indices_token, mask=inside, other=0).to(tl.int64)
    tl.device_assert((source >= 0) & (source < length), "token index outside its row")
    word = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    mask = inside[:, None] & (word < width)[None, :]
    value = tl.load(x + (row * x_row + source * x_token)[:, None] + (word * x_word)[None, :], mask=mask)
    tl.store(out + (row * out_row + at * out_token)[:, None] + word[None, :], value, mask=mask)


@triton.jit
def _combine_kernel(
    x, y, inverse, out, tokens, length, width,
    x_row, x_token, x_word, y_row, y_token, y_word, out_row, out_token,
    HAS_X: tl.constexpr, HAS_Y: tl.constexpr, ADD: tl.constexpr, SUM_TYPE: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < tokens
    row, at = token // length, token % length
    source = tl.load(inverse + token, mask=inside, other=-1).to(tl.int64)
    word = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    mask = inside[:, None] & (word < width)[None, :]
    ours = (source >= 0)[:, None]
    value = tl.zeros((TOKENS, WIDTH), out.dtype.element_ty)
    if HAS_X:
        passing = mask if ADD else mask & ~ours
        value = tl.load(x + (row * x_row + at * x_token)[:, None] + (word * x_word)[None, :], mask=passing, other=0)
    if HAS_Y:
        moved = tl.load(
            y + (row * y_row + source * y_token)[:, None] + (word * y_word)[None, :], mask=mask & ours, other=0
        )
        if ADD:
            moved = (value.to(SUM_TYPE) + moved.to(SUM_TYPE)).to(value.dtype)
        value = tl.where(ours, moved, value)
    tl.store(out + (row * out_row + at * out_token)[:, None] + word[None, :], value, mask=mask)


def gather(x: Tensor, indices_BK: Tensor, batch_first: bool) -> Tensor:
    """The tokens of ``x`` at the indices; the arguments as in :func:`penstock.data_pipeline.random_ltd.ops.gather`."""
    batch, kept = indices_BK.shape
    out = x.new_empty(with_length(x.shape, kept, batch_first))
    if not out.numel():
        return out
    source, target = _tokens(x, batch_first), _tokens(out, batch_first)
    grid, tile = _grid(batch * kept, source)
    with torch.cuda.device_of(x):  # which need not be the current one, where Triton would launch
        _gather_kernel[grid](
            source, indices_BK, target, batch * kept, kept, source.shape[1], source.shape[2],
            *source.stride(), *target.stride()[:2], *indices_BK.stride(), **tile,
        )  # fmt: skip
    return out


def combine(
    x: Tensor | None, y: Tensor | None, indices_BK: Tensor, length: int, batch_first: bool, add: bool
) -> Tensor:
    """``y``'s tokens among ``x``'s; the arguments as in :func:`penstock.data_pipeline.random_ltd.ops.combine`."""
    like = x if x is not None else y
    assert like is not None
    out = like.new_empty(with_length(like.shape, length, batch_first))
    if not out.numel():
        return out
    target = _tokens(out, batch_first, as_numbers=add)
    passing = target if x is None else _tokens(x, batch_first, as_numbers=add)
    others = target if y is None else _tokens(y, batch_first, as_numbers=add)
    tokens = indices_BK.shape[0] * length
    grid, tile = _grid(tokens, target)
    with torch.cuda.device_of(like):
        _combine_kernel[grid](
            passing, others, _inverse(indices_BK, length), target, tokens, length, target.shape[2],
            *passing.stride(), *others.stride(), *target.stride()[:2],
            HAS_X=x is not None, HAS_Y=y is not None, ADD=add, SUM_TYPE=_SUM_TYPES.get(target.dtype, tl.int64), **tile,
        )  # fmt: skip
    return out


def _inverse(indices_BK: Tensor, length: int) -> Tensor:
    """For each token of a row where it is among the kept ones, or -1; int32 ``[B, S]``."""
    batch, kept = indices_BK.shape
    at = torch.arange(kept, dtype=torch.int32, device=indices_BK.device).expand(batch, kept)
    inverse = torch.full((batch, length), -1, dtype=torch.int32, device=indices_BK.device)
    return inverse.scatter_(1, indices_BK.long(), at)


def _tokens(x: Tensor, batch_first: bool, *, as_numbers: bool = False) -> Tensor:
    """``[B, S, W]`` in integers of the size of ``x``'s values, or in those values."""
    if x.is_complex():
        x = torch.view_as_real(x)
    flat = x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    flat = flat if as_numbers else flat.view(_WORDS[x.element_size()])
    return flat if batch_first else flat.transpose(0, 1)


def _grid(tokens: int, like: Tensor) -> tuple[Sequence[int], dict[str, Any]]:
    """Programs, and the tile that each copies: as wide as a token if that fits, and as many tokens as then fit."""
    size = _TILE_BYTES // like.element_size()
    width = min(triton.next_power_of_2(like.shape[2]), size)
    count = size // width
    return (triton.cdiv(tokens, count), triton.cdiv(like.shape[2], width)), {"TOKENS": count, "WIDTH": width}
