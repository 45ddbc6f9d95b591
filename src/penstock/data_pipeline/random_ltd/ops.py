"""Moving tokens as operators of torch: what they compute, their shapes and their gradients.

Both take int32 or int64 indices ``[B, K]``, distinct within a row and in ``[0, S)``, and tensors ``[B, S, ...]``
(``[S, B, ...]`` unless ``batch_first``) of any dtype and strides. They return a new contiguous tensor and change none.

* ``torch.ops.penstock.ltd_gather`` (:func:`gather`): the tokens at the indices.
* ``torch.ops.penstock.ltd_combine`` (:func:`combine`): one tensor's tokens, with another's put or added at the indices;
  either may be missing and is then zero.

Each is the other's gradient, so that both can be differentiated any number of times, and nothing but the indices is
saved for the backward pass.

The kernels are chosen by the tensors' device: :mod:`penstock.data_pipeline.random_ltd.kernels.cpu`, Triton's for CUDA
in :mod:`penstock.data_pipeline.random_ltd.kernels.gpu`, and torch's indexing on any other. An index outside its row is
refused with a ``ValueError``; on a CUDA GPU, where looking would mean waiting for it, an assertion on the device stops
the program. That the indices of a row are distinct is not checked: of one that stands twice, either token is put.
"""

from typing import Any

import torch
from torch import Tensor

from penstock.data_pipeline.random_ltd.kernels import any_device, cpu
from penstock.data_pipeline.random_ltd.kernels.shapes import batch_and_length, with_length


@torch.library.custom_op("penstock::ltd_gather", mutates_args=())
def gather(x: Tensor, indices: Tensor, batch_first: bool) -> Tensor:
    """Copy the tokens at the indices.

    Args:
        x: ``[B, S, ...]``, or ``[S, B, ...]``.
        indices: ``[B, K]``.
        batch_first: Whether the batch is the first dimension.

    Returns:
        ``[B, K, ...]``, or ``[K, B, ...]``.

    Raises:
        ValueError: Shapes do not agree, or an index lies outside its row.
    """
    length = _check_gather(x, indices, batch_first)
    _check_range(indices, length)
    if x.device.type == "cpu":
        return cpu.gather(x, indices, batch_first)
    return any_device.gather(x, indices, batch_first)


@torch.library.custom_op("penstock::ltd_combine", mutates_args=())
def combine(
    x: Tensor | None, y: Tensor | None, indices: Tensor, length: int, batch_first: bool, add: bool = False
) -> Tensor:
    """Put tokens among others, or add them to those in their places.

    Args:
        x: ``[B, S, ...]``, or ``[S, B, ...]``; None stands for zeros.
        y: ``[B, K, ...]``, or ``[K, B, ...]``, of the same dtype; None stands for zeros. Not both may be None.
        indices: ``[B, K]``.
        length: Tokens of each row (S).
        batch_first: Whether the batch is the first dimension.
        add: Whether ``y``'s tokens are added to ``x``'s instead of replacing them. Needs both.

    Returns:
        A tensor of ``x``'s shape.

    Raises:
        ValueError: Shapes or dtypes do not agree, or an index lies outside its row.
    """
    like = _check_combine(x, y, indices, length, batch_first, add)
    _check_range(indices, length)
    if like.device.type == "cpu":
        return cpu.combine(x, y, indices, length, batch_first, add)
    return any_device.combine(x, y, indices, length, batch_first, add)


@gather.register_kernel("cuda")
def _gather_on_gpu(x: Tensor, indices: Tensor, batch_first: bool) -> Tensor:
    from penstock.data_pipeline.random_ltd.kernels import gpu

    _check_gather(x, indices, batch_first)
    return gpu.gather(x, indices, batch_first)


@combine.register_kernel("cuda")
def _combine_on_gpu(
    x: Tensor | None, y: Tensor | None, indices: Tensor, length: int, batch_first: bool, add: bool = False
) -> Tensor:
    from penstock.data_pipeline.random_ltd.kernels import gpu

    _check_combine(x, y, indices, length, batch_first, add)
    return gpu.combine(x, y, indices, length, batch_first, add)


@gather.register_fake
def _gather_shape(x: Tensor, indices: Tensor, batch_first: bool) -> Tensor:
    _check_gather(x, indices, batch_first)
    return x.new_empty(with_length(x.shape, indices.shape[1], batch_first))


@combine.register_fake
def _combine_shape(
    x: Tensor | None, y: Tensor | None, indices: Tensor, length: int, batch_first: bool, add: bool = False
) -> Tensor:
    like = _check_combine(x, y, indices, length, batch_first, add)
    return like.new_empty(with_length(like.shape, length, batch_first))


def _save_for_gather(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    x, indices, ctx.batch_first = inputs
    ctx.save_for_backward(indices)
    _, ctx.length = batch_and_length(x.shape, ctx.batch_first)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return combine(None, grad, indices, ctx.length, ctx.batch_first), None, None


def _save_for_combine(
    ctx: Any, inputs: tuple[Tensor | None, Tensor | None, Tensor, int, bool, bool], output: Tensor
) -> None:
    _, _, indices, ctx.length, ctx.batch_first, ctx.add = inputs
    ctx.save_for_backward(indices)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    (indices,) = ctx.saved_tensors
    grad_x = grad_y = None
    if ctx.needs_input_grad[0]:
        grad_x = grad if ctx.add else combine(grad, None, indices, ctx.length, ctx.batch_first)
    if ctx.needs_input_grad[1]:
        grad_y = gather(grad, indices, ctx.batch_first)
    return grad_x, grad_y, None, None, None, None


gather.register_autograd(_gather_backward, setup_context=_save_for_gather)
combine.register_autograd(_combine_backward, setup_context=_save_for_combine)


def _check_gather(x: Tensor, indices: Tensor, batch_first: bool) -> int:
    """Refuse indices that do not go with the tokens; returns S."""
    _check_kinds(x, indices)
    batch, length = batch_and_length(x.shape, batch_first)
    if indices.shape[0] != batch or indices.shape[1] > length:
        order = "[batch, tokens, ...]" if batch_first else "[tokens, batch, ...]"
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} do not go with activations of shape {tuple(x.shape)} "
            f"read as {order}: {batch} rows of {length} tokens"
        )
    return length


def _check_combine(
    x: Tensor | None, y: Tensor | None, indices: Tensor, length: int, batch_first: bool, add: bool
) -> Tensor:
    """Refuse tensors that do not go together; returns one of them."""
    if x is not None:
        if _check_gather(x, indices, batch_first) != length:
            raise ValueError(f"length={length} is not that of activations of shape {tuple(x.shape)}")
        if y is None:
            if add:
                raise ValueError("there are no tokens to add; pass y too, or add=False")
            return x
        kept_shape = with_length(x.shape, indices.shape[1], batch_first)
        if tuple(y.shape) != kept_shape:
            raise ValueError(
                f"the layer's tokens must have shape {kept_shape} to go back into {tuple(x.shape)} "
                f"at indices of shape {tuple(indices.shape)}, got {tuple(y.shape)}"
            )
        if y.dtype != x.dtype or y.device != x.device:
            raise ValueError(
                f"tokens of {y.dtype} on {y.device} do not go among tokens of {x.dtype} on {x.device}; convert them"
            )
        return x
    if y is None or add:
        raise ValueError("combine needs x or y, and both to add")
    _check_kinds(y, indices)
    batch, kept = batch_and_length(y.shape, batch_first)
    if tuple(indices.shape) != (batch, kept) or kept > length:
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} do not place tokens of shape {tuple(y.shape)} "
            f"in {batch} rows of {length} tokens"
        )
    return y


def _check_kinds(x: Tensor, indices: Tensor) -> None:
    if x.dim() < 2 or indices.dim() != 2:
        raise ValueError(
            f"expected activations of two dimensions or more and indices [batch, kept], "
            f"got shapes {tuple(x.shape)} and {tuple(indices.shape)}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token indices must be int32 or int64, got {indices.dtype}")
    if indices.device != x.device:
        raise ValueError(f"the indices lie on {indices.device}, the tokens on {x.device}; move the indices")


def _check_range(indices: Tensor, length: int) -> None:
    """Refuse indices outside their row: they would silently name a token of another."""
    if indices.numel():
        low, high = (int(value) for value in indices.aminmax())
        if low < 0 or high >= length:
            raise ValueError(f"token indices must lie in [0, {length}), got {low}..{high}")
