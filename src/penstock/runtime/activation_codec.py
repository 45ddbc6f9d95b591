"""Compression algorithms between pipeline stages."""

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from penstock._core.keys import derive, random_words
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.registry import create_compression_algorithm
from penstock.pipe.codec import Codec

ACTIVATION_COMPRESSIONS: Final = ("none", "bf16", "fp8", "int8", "int4")
_ROTATED: Final = 128
"""Elements rotated together: a block of int4's, whose scale then hangs on no single large activation."""


class AlgorithmCodec:
    """Tensors between stages by an algorithm, each by itself and without error memory.

    An error memory would have to be one per micro-batch and place in the sequence, and what it holds would be of
    another sample.

    Args:
        algorithm: One without randomness.
        rotated: Rotate blocks of 128 elements first, see :func:`rotate`.

    Attributes:
        name: Of the algorithm with its options.
    """

    def __init__(self, algorithm: CompressionAlgorithm, *, rotated: bool = False) -> None:
        self.name = f"{'rotated ' if rotated else ''}{algorithm!r}"
        self._algorithm = algorithm
        self._rotated = rotated

    def encode(self, tensor: Tensor) -> list[Tensor] | None:
        """The payload's tensors; None where they would take as many bytes."""
        layout = self._algorithm.layout_for(tensor.shape)
        if sum(field.nbytes for field in layout) >= tensor.nbytes:
            return None
        payload = self._algorithm.compress(rotate(tensor) if self._rotated else tensor)
        return [payload[field.name] for field in layout]

    def decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Decompress."""
        layout = self._algorithm.layout_for(out.shape)
        payload = {field.name: part for field, part in zip(layout, parts, strict=True)}
        if not self._rotated:
            self._algorithm.decompress(payload, out)
            return
        # Rotated values may be eleven times as large as those that come of them: too large for 16 bits.
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        turned = self._algorithm.decompress(payload, torch.empty(out.shape, dtype=wide, device=out.device))
        out.copy_(rotate(turned, back=True).view(out.shape))


def activation_codecs(name: str) -> dict[str, Codec]:
    """The codecs of both directions, ``"F"`` and ``"B"``; none for ``none``.

    With ``int4`` gradients travel as ``int8``: their errors add up over the stages that they pass, and no later layer
    makes up for them.
    """
    if name == "none":
        return {}
    forward = AlgorithmCodec(create_compression_algorithm(name), rotated=name == "int4")
    backward = AlgorithmCodec(create_compression_algorithm("int8" if name == "int4" else name))
    return {"F": forward, "B": backward}


def rotate(tensor: Tensor, *, back: bool = False) -> Tensor:
    """Blocks of 128 elements times a random orthogonal matrix: signs, then Hadamard's.

    It spreads what one large element holds over its block, so that few levels serve all (Ashkboos et al., "QuaRot:
    outlier-free 4-bit inference in rotated LLMs", NeurIPS 2024). The signs keep what all elements share, a mean, from
    becoming one large one. A rest shorter than a block is left as it is.

    Args:
        tensor: Floating, any shape.
        back: Undo it.

    Returns:
        A flat tensor; float32, or float64 for such a tensor.
    """
    flat = tensor.reshape(-1)
    flat = flat.clone() if flat.dtype == torch.float64 else flat.to(torch.float32, copy=True)
    blocks = flat[: flat.numel() // _ROTATED * _ROTATED].view(-1, _ROTATED)
    turn = _rotation(flat.device, flat.dtype)
    blocks.copy_(blocks @ (turn if back else turn.T))
    return flat


@cache
def _rotation(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix, ``[128, 128]``."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < _ROTATED:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    words = random_words(derive("rotation between stages"), np.arange(_ROTATED, dtype=np.uint64))
    signs = torch.from_numpy((words >> np.uint64(63)).astype(np.float64)) * 2 - 1
    rotation: Tensor = hadamard * signs / _ROTATED**0.5
    return rotation.to(device=device, dtype=dtype)
