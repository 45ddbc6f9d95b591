"""What a compressor is: tensor in, payload of plain tensors out, and back.

A payload's size depends on the tensor's shape alone, never on the values, so both ends of a collective know the
size of every message before it is sent and no lengths travel. A payload travels as one flat byte buffer (a *wire*):
scales and bits share one collective.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Final, NamedTuple, Self

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

    A NaN or infinity in the tensor must make some floating field of the payload non-finite: that is how a receiver
    notices.

    Attributes:
        name: The name under which the registry knows the class.
        linear: True when payloads made with the same key can be summed: the field ``values`` of the sum is the sum of
            the fields ``values`` up to rounding. One plain all-reduce then replaces the two-phase exchange.
        lossless: True when decompression gives back every bit; error feedback then has nothing to remember.
        sparse: True when a payload carries few elements of the tensor; it is exchanged by one all-gather.
        shaped: True when the payload depends on the tensor's shape, not only on its number of elements: the
            exchanges then hand over every parameter by itself.
        random: True when the result depends on a key; see :meth:`keyed`.
        unbiased: True when, over all keys, decompressed tensors are the tensor on average.
    """

    name: ClassVar[str]
    linear: ClassVar[bool] = False
    lossless: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    shaped: ClassVar[bool] = False

    @property
    def random(self) -> bool:
        """Whether the result depends on a key."""
        return False

    @property
    def unbiased(self) -> bool:
        """Whether decompressed tensors are, on average over all keys, the tensor itself."""
        return self.lossless

    @abstractmethod
    def payload_layout(self, numel: int) -> Sequence[PayloadField]:
        """The tensors that :meth:`compress` makes from a flat tensor of ``numel`` elements."""

    @abstractmethod
    def compress(self, tensor: Tensor) -> Payload:
        """Compress a floating tensor of any shape; its elements count in row-major order."""

    @abstractmethod
    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """Fill ``out``, a contiguous floating tensor of the original shape, and return it."""

    def layout_for(self, shape: Sequence[int]) -> Sequence[PayloadField]:
        """The tensors that :meth:`compress` makes from a tensor of this shape."""
        return self.payload_layout(math.prod(shape))

    def contraction(self, shape: Sequence[int] | int) -> float | None:
        """The largest ``delta`` known for which ``E |x - C(x)|**2 <= (1 - delta) |x|**2`` whatever ``x`` of this shape.

        ``C(x)`` is what a receiver sees; 1 is lossless. None where no such bound holds.
        """
        return 1.0 if self.lossless else None

    def keyed(self, *parts: int | str) -> Self:
        """This algorithm with its randomness keyed by what it decides (step, bucket, rank); itself if it has none."""
        return self

    def decompress_add(self, payload: Payload, out: Tensor) -> Tensor:
        """Add what :meth:`decompress` would give to ``out``, and return it."""
        return out.add_(self.decompress(payload, torch.empty_like(out)))

    def check_feedback(self) -> None:  # noqa: B027 - most algorithms have nothing to refuse
        """Raise ``ValueError`` if an error memory would grow without bound under this algorithm with these options."""

    def compress_with_memory(self, tensor: Tensor, memory: Tensor) -> Payload:
        """Compress ``tensor + memory`` and leave in ``memory`` what the payload does not carry.

        Where nothing finite can be left (a NaN or an infinity came in, or the payload's range was exceeded), the
        memory stays as it was: the receiver sees the NaN or infinity, the memory never does.

        Args:
            tensor: Floating, any shape and strides; only read.
            memory: Contiguous, float32 or float64, with the same number of elements; updated in place.
        """
        total = memory.view(tensor.shape) + tensor
        payload = self.compress(total)
        seen = self.decompress(payload, torch.empty_like(total, memory_format=torch.contiguous_format))
        flat = (total - seen).reshape(-1)  # not in place: a payload may share the tensor's storage
        memory.copy_(torch.where(torch.isfinite(flat), flat, memory.view(-1)).view_as(memory))
        return payload

    def bytes_for(self, shape: Sequence[int] | int) -> int:
        """Bytes on the wire for one tensor of this shape (padding between fields included)."""
        return wire_bytes(tuple(self.layout_for((shape,) if isinstance(shape, int) else shape)))

    def options(self) -> dict[str, Any]:
        """The keyword arguments that make an equal algorithm; plain values, fit for JSON."""
        return {option: getattr(self, option) for option in option_names(type(self))}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        return f"{type(self).__name__}({options})"


def option_names(cls: type[CompressionAlgorithm]) -> list[str]:
    """Names of the options that an algorithm class takes."""
    return [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]


def required_options(cls: type[CompressionAlgorithm]) -> list[str]:
    """Names of the options that have no default."""
    parameters = inspect.signature(cls).parameters
    return [name for name in option_names(cls) if parameters[name].default is inspect.Parameter.empty]


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
