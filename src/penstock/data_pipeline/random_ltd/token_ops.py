"""Take some tokens out of a batch and put them back, with gradients that are right for each operation alone.

:class:`GatherTokens` and :class:`ScatterTokens` stand each on its own. :func:`drop_tokens` and :func:`restore_tokens`
belong together, as :func:`dropped_layer` uses them: knowing that every token which leaves comes back, the pair writes
the result in one pass over memory, and the gradient of its input in another.

All save the indices only. Tokens within a row are distinct, so each place has one contribution: the results are
deterministic.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from penstock.data_pipeline.random_ltd.kernels.shapes import batch_and_length
from penstock.data_pipeline.random_ltd.ops import combine, gather


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
        indices = _beside(sorted_indices, activations)
        gathered = gather(activations, indices, batch_first)
        _remember(ctx, activations, indices, batch_first)
        return activations, gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Add the gathered tokens' gradients to the others', in new memory."""
        grad_all, grad_gathered = grads
        if grad_gathered is None:
            return grad_all, None, None
        (indices,) = ctx.saved_tensors
        grad = combine(grad_all, grad_gathered, indices, ctx.length, ctx.batch_first, add=grad_all is not None)
        return grad, None, None


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
        """Copy everything but the replaced tokens, and those from the layer."""
        return _merge(ctx, all_activations, layer_activations, sorted_indices, batch_first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Zeros at the replaced tokens for the one, those tokens for the other, both in new memory."""
        (grad,) = grads
        (indices,) = ctx.saved_tensors
        grad_all = None
        if ctx.needs_input_grad[0]:
            grad_all = combine(grad, None, indices, ctx.length, ctx.batch_first)
        return grad_all, _layer_gradient(ctx, grad, indices), None, None


class _DropTokens(Function):
    """As :class:`GatherTokens`, but what comes back along ``passing`` is the gradient that :class:`_RestoreTokens` got.

    Its values at the kept tokens are those of the merged result, not of ``passing``; the layer's take their places.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, indices: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        kept = gather(hidden, indices, batch_first)
        _remember(ctx, hidden, indices, batch_first)
        return hidden, kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        # Without a gradient for the kept tokens the layer does not depend on them: zeros take their places.
        (indices,) = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return None, None, None
        return combine(*grads, indices, ctx.length, ctx.batch_first), None, None


class _RestoreTokens(Function):
    """As :class:`ScatterTokens`, but hands its whole gradient to ``passing``, as it is; see :class:`_DropTokens`."""

    @staticmethod
    def forward(ctx: Any, passing: Tensor, computed: Tensor, indices: Tensor, batch_first: bool) -> Tensor:
        return _merge(ctx, passing, computed, indices, batch_first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,) = grads
        (indices,) = ctx.saved_tensors
        return grad, _layer_gradient(ctx, grad, indices), None, None


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


def drop_tokens(hidden: Tensor, indices: Tensor, batch_first: bool = True) -> tuple[Tensor, Tensor]:
    """Take the kept tokens out, to be computed and given back to :func:`restore_tokens`.

    Args:
        hidden: ``[B, S, ...]`` if ``batch_first``, else ``[S, B, ...]``.
        indices: int32 or int64 ``[B, K]``, distinct within a row, in ``[0, S)``.
        batch_first: Whether the batch is the first dimension.

    Returns:
        ``passing``, which is ``hidden`` and is to be used for nothing but one call of :func:`restore_tokens` with the
        same indices (only the pair's gradient is right); and the kept tokens, ``[B, K, ...]`` or ``[K, B, ...]``.
    """
    both: tuple[Tensor, Tensor] = _DropTokens.apply(hidden, _beside(indices, hidden), batch_first)  # type: ignore[no-untyped-call]
    return both


def restore_tokens(passing: Tensor, computed: Tensor, indices: Tensor, batch_first: bool = True) -> Tensor:
    """Put computed tokens back among those that passed by.

    Args:
        passing: From :func:`drop_tokens`.
        computed: What has become of the kept tokens, of their shape; another dtype is converted.
        indices: As given to :func:`drop_tokens`.
        batch_first: As given to :func:`drop_tokens`.

    Returns:
        A new tensor of the shape and dtype of ``passing``.
    """
    merged: Tensor = _RestoreTokens.apply(passing, computed, _beside(indices, passing), batch_first)  # type: ignore[no-untyped-call]
    return merged


def dropped_layer(
    layer: Callable[[Tensor], Tensor], hidden: Tensor, indices: Tensor, batch_first: bool = True
) -> Tensor:
    """Apply a layer to the kept tokens; the others pass it by. Gather, layer and scatter as one differentiable unit.

    Forward and backward each read and write every token once, beside the layer's own copy of the kept ones.

    Args:
        layer: From the kept tokens, ``[B, K, ...]`` or ``[K, B, ...]``, to as many.
        hidden: ``[B, S, ...]`` if ``batch_first``, else ``[S, B, ...]``.
        indices: int32 or int64 ``[B, K]``, distinct within a row, in ``[0, S)``.
        batch_first: Whether the batch is the first dimension.

    Returns:
        A new tensor of the shape and dtype of ``hidden``.
    """
    passing, kept = drop_tokens(hidden, indices, batch_first)
    return restore_tokens(passing, layer(kept), indices, batch_first)


def _remember(ctx: Any, tokens: Tensor, indices: Tensor, batch_first: bool) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices)
    ctx.batch_first = batch_first
    _, ctx.length = batch_and_length(tokens.shape, batch_first)


def _merge(ctx: Any, tokens: Tensor, computed: Tensor, indices: Tensor, batch_first: bool) -> Tensor:
    indices = _beside(indices, tokens)
    _, length = batch_and_length(tokens.shape, batch_first)
    merged: Tensor = combine(tokens, computed.to(tokens.dtype), indices, length, batch_first)
    ctx.save_for_backward(indices)
    ctx.batch_first, ctx.length, ctx.layer_dtype = batch_first, length, computed.dtype
    return merged


def _layer_gradient(ctx: Any, grad: Tensor, indices: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[1]:
        return None
    layer_grad: Tensor = gather(grad, indices, ctx.batch_first).to(ctx.layer_dtype)
    return layer_grad


def _beside(indices: Tensor, tokens: Tensor) -> Tensor:
    """The indices on the tokens' device; drawn on the CPU, they may lie there still."""
    return indices.to(tokens.device)
