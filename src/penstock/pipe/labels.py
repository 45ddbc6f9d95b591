"""How many tokens a loss covers."""

from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

IGNORED: Final = -100
"""The label that torch's and Hugging Face's losses leave out."""


def count_labels(targets: Any) -> int:
    """Tokens that a loss covers: labels other than -100 in the first integer tensor, else rows of the first tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves(targets) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool:
            return int((tensor != IGNORED).sum())
    return tensors[0].shape[0] if tensors and tensors[0].dim() else 1
