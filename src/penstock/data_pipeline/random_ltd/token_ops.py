"""Take some tokens out of a batch and put them back, with gradients that are right for each operation alone.

Both operations save the indices only. Tokens within a row are distinct, so adding and copying by index has one
contribution for each place and is deterministic.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class GatherTokens(Function):
    """``GatherTokens.apply(activations, sorted_indices, batch_first)`` → ``(activations, gathered)``.

    The activations are handed through so that a later :class:`ScatterTokens` can put the tokens back into them.

    * activations: ``[B, S, ...]`` if ``batch_first``, else ``[S, B, ...]``; any dtype.
    * sorted_indices: int32 or int64 ``[B, K]``, distinct within a row, in ``[0, S)``.
    * gathered: ``[B, K, ...]`` or ``[K, B, ...]``, contiguous.

    Gradient: that of the first output, plus that of the second added at the kept tokens, in a new tensor.

    PyTorch gives the first output out as a view of the input and refuses to change it in place; ``gathered`` may be
    changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any, activations: Tensor, sorted_indices: Tensor, batch_first: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Copy the kept tokens out."""
        batch, length = _sizes(activations, sorted_indices, batch_first)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sorted_indices)
        ctx.batch_first, ctx.shape = batch_first, activations.shape
        rows = flat_rows(sorted_indices, batch, length, batch_first).to(activations.device)
        # Filled through a view, so that the output itself is none and a layer may change it in place.
        gathered = activations.new_empty(_kept_shape(activations.shape, sorted_indices.shape[1], batch_first))
        torch.index_select(activations.flatten(0, 1), 0, rows, out=gathered.flatten(0, 1))
        return activations, gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Add the gathered tokens' gradients to the others', in new memory."""
        grad_all, grad_gathered = grads
        if grad_gathered is None:
            return grad_all, None, None
        (sorted_indices,) = ctx.saved_tensors
        batch, length = _batch_and_length(ctx.shape, ctx.batch_first)
        rows = flat_rows(sorted_indices, batch, length, ctx.batch_first).to(grad_gathered.device)
        if grad_all is None:
            grad_all = grad_gathered.new_zeros(ctx.shape)
        grad = grad_all.flatten(0, 1).index_add(0, rows, grad_gathered.flatten(0, 1))
        return grad.view(ctx.shape), None, None


class ScatterTokens(Function):
    """``ScatterTokens.apply(all_activations, layer_activations, sorted_indices, batch_first)`` → the two merged.

    * all_activations: ``[B, S, ...]`` if ``batch_first``, else ``[S, B, ...]``; not changed.
    * layer_activations: ``[B, K, ...]`` or ``[K, B, ...]``; its dtype may differ (under autocast) and is converted.
    * sorted_indices: int32 or int64 ``[B, K]``, distinct within a row, in ``[0, S)``.
    * result: a new tensor like ``all_activations`` with the tokens at the indices replaced.

    Gradient of ``all_activations``: the incoming one with zeros at the replaced tokens; of ``layer_activations``: the
    incoming one at those tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        all_activations: Tensor,
        layer_activations: Tensor,
        sorted_indices: Tensor,
        batch_first: bool = True,
    ) -> Tensor:
        """Copy everything, then the tokens over it."""
        batch, length = _sizes(all_activations, sorted_indices, batch_first)
        kept_shape = _kept_shape(all_activations.shape, sorted_indices.shape[1], batch_first)
        if layer_activations.shape != kept_shape:
            raise ValueError(
                f"the layer's tokens must have shape {tuple(kept_shape)} to go back into "
                f"{tuple(all_activations.shape)} at indices of shape {tuple(sorted_indices.shape)}, "
                f"got {tuple(layer_activations.shape)}"
            )
        ctx.save_for_backward(sorted_indices)
        ctx.batch_first, ctx.layer_dtype = batch_first, layer_activations.dtype
        rows = flat_rows(sorted_indices, batch, length, batch_first).to(all_activations.device)
        merged = all_activations.clone(memory_format=torch.contiguous_format)
        merged.flatten(0, 1).index_copy_(0, rows, layer_activations.to(merged.dtype).flatten(0, 1))
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Zeros at the replaced tokens for the one, those tokens for the other, both in new memory."""
        (grad,) = grads
        (sorted_indices,) = ctx.saved_tensors
        batch, length = _batch_and_length(grad.shape, ctx.batch_first)
        rows = flat_rows(sorted_indices, batch, length, ctx.batch_first).to(grad.device)
        grad_all = grad_layer = None
        if ctx.needs_input_grad[0]:
            grad_all = grad.flatten(0, 1).index_fill(0, rows, 0.0).view(grad.shape)
        if ctx.needs_input_grad[1]:
            kept_shape = _kept_shape(grad.shape, sorted_indices.shape[1], ctx.batch_first)
            grad_layer = grad.flatten(0, 1).index_select(0, rows).view(kept_shape).to(ctx.layer_dtype)
        return grad_all, grad_layer, None, None


def gather_tokens(activations: Tensor, sorted_indices: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """:class:`GatherTokens` as a typed function."""
    both: tuple[Tensor, Tensor] = GatherTokens.apply(activations, sorted_indices, batch_first)  # type: ignore[no-untyped-call]
    return both


def scatter_tokens(
    all_activations: Tensor, layer_activations: Tensor, sorted_indices: Tensor, batch_first: bool
) -> Tensor:
    """:class:`ScatterTokens` as a typed function."""
    merged: Tensor = ScatterTokens.apply(all_activations, layer_activations, sorted_indices, batch_first)  # type: ignore[no-untyped-call]
    return merged


def flat_rows(sorted_indices: Tensor, batch: int, length: int, batch_first: bool) -> Tensor:
    """Where the kept tokens lie when the first two dimensions are one; int64 ``[B * K]`` in the output's order."""
    at = sorted_indices.to(torch.int64)
    row = torch.arange(batch, device=at.device).unsqueeze(1)
    if batch_first:
        return (row * length + at).flatten()
    return (at * batch + row).t().flatten()


def _sizes(activations: Tensor, sorted_indices: Tensor, batch_first: bool) -> tuple[int, int]:
    """Check that the indices go with the activations; returns (B, S)."""
    if activations.dim() < 2 or sorted_indices.dim() != 2:
        raise ValueError(
            f"expected activations of two dimensions or more and indices [batch, kept], "
            f"got shapes {tuple(activations.shape)} and {tuple(sorted_indices.shape)}"
        )
    if sorted_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token indices must be int32 or int64, got {sorted_indices.dtype}")
    batch, length = _batch_and_length(activations.shape, batch_first)
    if sorted_indices.shape[0] != batch or sorted_indices.shape[1] > length:
        order = "[batch, tokens, ...]" if batch_first else "[tokens, batch, ...]"
        raise ValueError(
            f"indices of shape {tuple(sorted_indices.shape)} do not go with activations of shape "
            f"{tuple(activations.shape)} read as {order}: {batch} rows of {length} tokens"
        )
    # An index outside its row would silently name a token of another row. On a GPU looking would mean waiting for it.
    if sorted_indices.device.type == "cpu" and sorted_indices.numel():
        low, high = (int(value) for value in sorted_indices.aminmax())
        if low < 0 or high >= length:
            raise ValueError(f"token indices must lie in [0, {length}), got {low}..{high}")
    return batch, length


def _batch_and_length(shape: torch.Size, batch_first: bool) -> tuple[int, int]:
    return (shape[0], shape[1]) if batch_first else (shape[1], shape[0])


def _kept_shape(shape: torch.Size, kept: int, batch_first: bool) -> torch.Size:
    leading = (shape[0], kept) if batch_first else (kept, shape[1])
    return torch.Size((*leading, *shape[2:]))
