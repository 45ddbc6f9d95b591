"""Stage values in fewer bytes: which tensors of a value are encoded, and how a frame says so.

What the next stage computes on has been rounded; gradients come back as if it had not been (Bengio et al., "Estimating
or propagating gradients through stochastic neurons", 2013: the straight-through estimator), and are rounded in turn.

An encoded value's structure is ``("c", structure, (description, ...))``, one description for each of the value's
tensors: ``()`` for one that travels as it is, or ``(parts, wants, dtype, *shape)``.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from penstock.pipe.value import Structure

ENCODED: Final = "c"
_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


class Codec(Protocol):
    """Tensors in fewer bytes, the same for the same values.

    Attributes:
        name: What ranks compare before the first step; equal names must mean equal results.
    """

    name: str

    def encode(self, tensor: Tensor) -> Sequence[Tensor] | None:
        """Dense tensors of any dtypes for a floating one; None where they would not be smaller.

        Their number, dtypes and shapes, and whether there are any, follow from the tensor's dtype and shape alone.
        """

    def decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Fill ``out``, contiguous and of the original's dtype and shape, from what :meth:`encode` gave."""


class Encoded(NamedTuple):
    """A value ready to travel.

    Attributes:
        structure: As the module describes.
        tensors: Those that travel.
        spared_bytes: What encoding saved.
    """

    structure: Structure
    tensors: list[Tensor]
    spared_bytes: int


class Decoded(NamedTuple):
    """A value as the receiving stage gets it.

    Attributes:
        structure: See :mod:`penstock.pipe.value`.
        tensors: In the structure's order.
        requires_grad: For each tensor, whether the sender wants its gradient.
        spared_bytes: What encoding saved.
    """

    structure: Structure
    tensors: list[Tensor]
    requires_grad: tuple[bool, ...]
    spared_bytes: int


def encode_value(codec: Codec, structure: Structure, tensors: Sequence[Tensor], *, all_floats: bool) -> Encoded:
    """Encode the floating tensors of a value.

    Args:
        codec: Encodes one tensor.
        structure: From :func:`penstock.pipe.value.flatten`, as are the tensors.
        tensors: Those of other dtypes (token numbers, masks of booleans) travel as they are.
        all_floats: Also those that require no gradient. Among gradients none does; among activations such are not
            computed but looked up (additive masks with infinities, rotary tables), and stay exact.
    """
    descriptions: list[Structure] = []
    sent: list[Tensor] = []
    spared = 0
    for tensor in tensors:
        wanted = tensor.dtype in _NAMES and (all_floats or tensor.requires_grad)
        parts = codec.encode(tensor.detach()) if wanted else None
        if parts is None:
            descriptions.append(())
            sent.append(tensor)
        else:
            descriptions.append((len(parts), int(tensor.requires_grad), _NAMES[tensor.dtype], *tensor.shape))
            sent += parts
            spared += tensor.nbytes - sum(part.nbytes for part in parts)
    return Encoded((ENCODED, structure, tuple(descriptions)), sent, spared)


def decode_value(
    codec: Codec, structure: Structure, tensors: Sequence[Tensor], requires_grad: Sequence[bool]
) -> Decoded:
    """Inverse of :func:`encode_value`, but for what the rounding took.

    Args:
        codec: Equal to the sender's.
        structure: As it arrived, and the tensors.
        tensors: Those that travelled.
        requires_grad: For each of them, whether the sender wants its gradient.

    Raises:
        ValueError: The structure is not one of an encoded value.
    """
    if structure[0] != ENCODED:
        raise ValueError(
            f"a value arrived as it is where one encoded by {codec.name!r} was expected; all ranks must encode alike"
        )
    _, inner, descriptions = structure
    rest = list(zip(tensors, requires_grad, strict=True))
    found: list[Tensor] = []
    wants: list[bool] = []
    at = spared = 0
    for description in descriptions:
        if not description:
            tensor, wanted = rest[at]
            at += 1
        else:
            count, wanted, dtype, *shape = description
            parts = [part for part, _ in rest[at : at + count]]
            tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=parts[0].device)
            codec.decode(parts, tensor)
            at += count
            spared += tensor.nbytes - sum(part.nbytes for part in parts)
        found.append(tensor)
        wants.append(bool(wanted))
    return Decoded(inner, found, tuple(wants), spared)
