"""Moving tokens by torch's own indexing, on devices without kernels of their own."""

import torch
from torch import Tensor

from penstock.data_pipeline.random_ltd.kernels.shapes import with_length


def gather(x: Tensor, indices_BK: Tensor, batch_first: bool) -> Tensor:
    """The tokens of ``x`` at the indices; the arguments as in :func:`penstock.data_pipeline.random_ltd.ops.gather`."""
    return x[_places(indices_BK, batch_first)]


def combine(
    x: Tensor | None, y: Tensor | None, indices_BK: Tensor, length: int, batch_first: bool, add: bool
) -> Tensor:
    """``y``'s tokens among ``x``'s; the arguments as in :func:`penstock.data_pipeline.random_ltd.ops.combine`."""
    like = x if x is not None else y
    assert like is not None
    if x is None:
        out = like.new_zeros(with_length(like.shape, length, batch_first))
    else:
        out = x.clone(memory_format=torch.contiguous_format)
    tokens = like.new_zeros(()) if y is None else y
    return out.index_put_(_places(indices_BK, batch_first), tokens, accumulate=add)


def _places(indices_BK: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The first two dimensions' indices of the tokens, in their order."""
    at = indices_BK.long()
    rows = torch.arange(at.shape[0], device=at.device)
    return (rows[:, None], at) if batch_first else (at.t(), rows)
