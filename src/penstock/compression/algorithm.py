"""What a compressor is: tensor in, payload of plain tensors out, and back.

A payload's size depends on the number of elements alone, never on the values, so both ends of a collective know the
size of every message before it is sent and no lengths travel. A payload travels as one flat byte buffer (a *wire*):
scales and bits share one collective.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor

Payload = dict[str, Tensor]

_FIELD_ALIGNMENT: Final = 8


class PayloadField(NamedTuple):
    """One tensor of a payload: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of this field's values."""
        return math.prod(self.shape) * self.dtype.itemsize


class CompressionAlgorithm(ABC):
    """Turns tensors into payloads of known size and back; keeps no state between calls.

    A subclass sets :attr:`name`, takes its options as keyword arguments of ``__init__`` (each stored under its own
    name, so that :meth:`options` can report it) and implements :meth:`payload_layout`, :meth:`compress` and
    :meth:`decompress`. Compression need not be unbiased: :class:`~penstock.compression.ErrorFeedback` carries what
    was not sent over to the next call.

    Attributes:
        name: The name under which the registry knows the class.
        linear: True when a sum of payloads is the payload of the sum up to rounding, so that one plain all-reduce
            in :meth:`wire_dtype` replaces the two-phase exchange.
        lossless: True when decompression gives back every bit; error feedback then has nothing to remember.
    """

    name: ClassVar[str]
    linear: ClassVar[bool] = False
    lossless: ClassVar[bool] = False

    @abstractmethod
    def payload_layout(self, numel: int) -> Sequence[PayloadField]:
        """The tensors that :meth:`compress` makes from ``numel`` elements."""

    @abstractmethod
    def compress(self, tensor: Tensor) -> Payload:
        """Compress a floating tensor of any shape; its elements count in row-major order."""

    @abstractmethod
    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """Fill ``out``, a contiguous floating tensor with the original number of elements, and return it."""

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a linear algorithm's values for a ``dtype`` tensor are summed by an all-reduce."""
        raise TypeError(f"{self.name} is not linear: its payloads cannot be summed by an all-reduce of {dtype}")

    def compress_residual_(self, tensor: Tensor) -> Payload:
        """Compress ``tensor`` and leave in it, in place, what the payload does not carry.

        Elements whose residual is not finite (a NaN or an infinity came in, or the payload's range was exceeded)
        are set to zero: the receiver sees the NaN or infinity, the caller's error memory never does.

        Args:
            tensor: Contiguous floating tensor; overwritten.
        """
        payload = self.compress(tensor)
        sent = torch.empty_like(tensor)
        tensor.sub_(self.decompress(payload, sent))
        tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return payload

    def bytes_for(self, shape: Sequence[int] | int) -> int:
        """Bytes on the wire for one tensor of this shape (padding between fields included)."""
        numel = shape if isinstance(shape, int) else math.prod(shape)
        return wire_bytes(tuple(self.payload_layout(numel)))

    def options(self) -> dict[str, Any]:
        """The keyword arguments that make an equal algorithm; plain values, fit for JSON."""
        return {option: getattr(self, option) for option in option_names(type(self))}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        return f"{type(self).__name__}({options})"


def option_names(cls: type[CompressionAlgorithm]) -> list[str]:
    """Names of the options that an algorithm class takes."""
    return [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]


def wire_bytes(layout: Sequence[PayloadField]) -> int:
    """Bytes of the flat buffer that holds a payload of this layout."""
    return _offsets(tuple(layout))[-1]


def wire_views(wire: Tensor, layout: Sequence[PayloadField]) -> Payload:
    """A payload whose tensors are views into ``wire``.

    Args:
        wire: Contiguous uint8 tensor of at least ``wire_bytes(layout)`` elements, its storage offset a multiple of 8.
        layout: From :meth:`CompressionAlgorithm.payload_layout`.
    """
    fields = tuple(layout)
    return {
        field.name: wire[start : start + field.nbytes].view(field.dtype).view(field.shape)
        for field, start in zip(fields, _offsets(fields), strict=False)
    }


def write_wire(wire: Tensor, payload: Mapping[str, Tensor], layout: Sequence[PayloadField]) -> None:
    """Copy a payload into its flat buffer, checking it against the layout that its algorithm promised."""
    if payload.keys() != {field.name for field in layout}:
        raise ValueError(f"payload holds {sorted(payload)}, but its layout promises {[f.name for f in layout]}")
    for field, view in zip(layout, wire_views(wire, layout).values(), strict=True):
        part = payload[field.name]
        if part.dtype != field.dtype or tuple(part.shape) != tuple(field.shape):
            raise ValueError(
                f"payload field {field.name!r} is {part.dtype} {tuple(part.shape)}, "
                f"but its layout promises {field.dtype} {tuple(field.shape)}"
            )
        view.copy_(part)


@lru_cache(maxsize=4096)
def _offsets(layout: tuple[PayloadField, ...]) -> tuple[int, ...]:
    """Where each field starts, and the total."""
    offsets = [0]
    for field in layout:
        end = offsets[-1] + field.nbytes
        offsets.append(-(-end // _FIELD_ALIGNMENT) * _FIELD_ALIGNMENT)
    return tuple(offsets)
