"""The scalar that a micro-batch's backward pass starts from."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.pipe.value import flatten

LossFn = Callable[[Any, Any], Any]
"""``loss_fn(output, targets)`` returns a scalar floating-point tensor."""


def loss_of(output: Any, targets: Any, loss_fn: LossFn | None, *, stage: int) -> Tensor:
    """The loss of the last stage's output.

    Args:
        output: Of the last stage. Without a loss function: the loss itself, or something with a ``loss`` attribute or
            key, as models of Hugging Face return it.
        targets: For the loss function.
        loss_fn: May be None.
        stage: For messages.

    Returns:
        A tensor of no dimensions.

    Raises:
        ValueError: What there is, is no scalar floating-point tensor.
    """
    if loss_fn is not None:
        loss = loss_fn(output, targets)
        source = f"loss_fn ({getattr(loss_fn, '__name__', type(loss_fn).__name__)})"
    else:
        loss = _inside(output)
        source = "without a loss_fn, the last layer"
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"stage {stage}: {source} must return a scalar tensor (or, without a loss_fn, something with a 'loss'), "
            f"got {type(loss).__name__}"
        )
    if loss.dim() != 0:
        remedy = "reduce it, for example with .mean()"
        if loss_fn is None:
            remedy = f"give a loss_fn(output, targets) to initialize or PipelineModule, or {remedy}"
        raise ValueError(
            f"stage {stage}: {source} must return a scalar, got a tensor of shape {tuple(loss.shape)}; {remedy}"
        )
    if not loss.is_floating_point():
        raise ValueError(f"stage {stage}: {source} must return a floating-point loss, got {loss.dtype}")
    return loss


def no_loss(output: Any, *, stage: int) -> Tensor:
    """A zero that depends on the last stage's output, for a micro-batch that counts for nothing.

    Losses are means over the tokens that count; where none does they are NaN, and so would be every gradient.
    """
    _, tensors = flatten(output, what=f"the output of stage {stage}")
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return torch.stack([tensor.sum().double() for tensor in wanted or tensors]).sum() * 0.0


def _inside(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("loss", output)
    return getattr(output, "loss", output)
