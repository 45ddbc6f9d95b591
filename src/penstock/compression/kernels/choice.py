"""Which kernels compress a tensor: Numba's on a CPU, Triton's on a GPU, or none (then torch and numpy do, in tiles).

All give the same scales, codes and residuals; on a CPU bit for bit. Numba (the extra ``numba``) compiles when a kernel
is first called and keeps the result in its cache.
"""

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor

Choice = Literal["auto", "none"]
_choice: Choice = "auto"
_LARGEST_ON_GPU: Final = 1 << 14
"""Elements of a block that one program of a GPU's kernel holds in its registers."""


class BlockKernels(Protocol):
    """One algorithm's compression and decompression of flat, contiguous float32 tensors."""

    def encode(self, tensor: Tensor, memory: Tensor | None, scales: Tensor, codes: Tensor, block_size: int) -> None:
        """Compress ``tensor`` plus ``memory`` and leave in the memory what is not sent, in one pass.

        Args:
            tensor: Flat; only read.
            memory: As many elements, updated in place; None for none. A block that is not finite keeps its own.
            scales: float32, one for each block; filled.
            codes: uint8; filled.
            block_size: Elements of a block.
        """

    def decode(self, scales: Tensor, codes: Tensor, out: Tensor, block_size: int, *, add: bool) -> None:
        """Fill ``out`` with what a receiver sees, or add it."""


def use_kernels(choice: Choice) -> None:
    """Say whether kernels may be used: ``"auto"`` where there are some, ``"none"`` for torch and numpy alone."""
    global _choice
    if choice not in ("auto", "none"):
        raise ValueError(f"unknown choice of kernels {choice!r}; known: 'auto', 'none'")
    _choice = choice


def kernels_for(name: str, key: int | None, *tensors: Tensor, block_size: int) -> BlockKernels | None:
    """The kernels for tensors of one device; None where there are none for their dtype, device or size of blocks.

    Args:
        name: The algorithm's name; ``int8`` and ``int4`` round to the nearest if ``key`` is None.
        key: Of random rounding.
        tensors: All that are to be read or written.
        block_size: Elements of a block.
    """
    if _choice == "none" or any(tensor.dtype != torch.float32 for tensor in tensors):
        return None
    device = tensors[0].device.type
    if device == "cpu":
        kernels = _compiled("numba", "cpu")
    elif device == "cuda" and block_size <= _LARGEST_ON_GPU:
        kernels = _compiled("triton", "gpu")
    else:
        return None
    found: BlockKernels | None = None if kernels is None else kernels.find(name, key)
    return found


@cache
def _compiled(package: str, module: str) -> Any:
    """Our module of kernels that a package compiles; None where that is not installed, or cannot be used."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.import_module(f"penstock.compression.kernels.{module}")
    except (ImportError, RuntimeError) as error:  # it is of another numpy, or has no folder to keep its code in
        warnings.warn(f"compression goes without {package}, which cannot be used here: {error}", stacklevel=2)
        return None
