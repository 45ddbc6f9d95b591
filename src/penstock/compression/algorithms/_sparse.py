"""What the algorithms share that send few elements of each chunk."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField
from penstock.compression.algorithms._blocks import as_flat


class Part(NamedTuple):
    """Equal chunks in a row: all whole chunks of a tensor, or the rest.

    Attributes:
        start: The first element.
        rows: How many chunks.
        length: Elements of each.
        first: How many elements are sent of what lies before.
        keep: Elements sent of each chunk.
    """

    start: int
    rows: int
    length: int
    first: int
    keep: int

    def of(self, flat: Tensor) -> Tensor:
        """The chunks, ``[rows, length]``."""
        return flat[self.start : self.start + self.rows * self.length].view(self.rows, self.length)

    def kept(self, field: Tensor) -> Tensor:
        """Their sent elements in a field that holds one entry for each, ``[rows, keep]``."""
        return field[self.first : self.first + self.rows * self.keep].view(self.rows, self.keep)


class TopKByChunk(CompressionAlgorithm):
    """The ``keep`` elements of largest magnitude of every ``chunk_size`` consecutive ones; a short rest sends as many.

    Choosing by chunk needs no sort of the whole tensor, bounds the places to few bits, and gives the payload a size
    known in advance.

    Args:
        chunk_size: Elements of a chunk, at most 65536.
        keep: Elements sent of a chunk.
    """

    sparse = True

    def __init__(self, *, chunk_size: int, keep: int) -> None:
        for option, value, most in (("chunk_size", chunk_size, 1 << 16), ("keep", keep, chunk_size)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"{option} must be a whole number from 1 to {most}, got {value!r}")
        self.chunk_size = chunk_size
        self.keep = keep

    def compress(self, tensor: Tensor) -> Payload:
        """The largest elements and their places."""
        flat = as_flat(tensor)
        values = torch.empty(self._sent(flat.numel()), dtype=flat.dtype, device=flat.device)
        places = torch.empty(self._sent(flat.numel()), dtype=torch.int64, device=flat.device)
        for part in self._chunks(flat.numel()):
            chunks = part.of(flat)
            chosen = torch.topk(chunks.abs(), part.keep, dim=1, sorted=False).indices
            part.kept(places).copy_(chosen)
            part.kept(values).copy_(chunks.gather(1, chosen))
        return {"places": pack_places(places, self.chunk_size), **self._pack_values(values)}

    def compress_with_memory(self, tensor: Tensor, memory: Tensor) -> Payload:
        """Add the tensor to the memory and take what is sent out of it."""
        owed = memory.view(-1)
        total = owed + as_flat(tensor)
        payload = self.compress(total)
        values, places = self._unpack(payload, total)
        for part in self._chunks(total.numel()):
            part.of(total).scatter_add_(1, part.kept(places), -part.kept(values))
        # A NaN or infinity counts as largest: unless one was sent there is none.
        if total.device.type != "cpu" or not bool(torch.isfinite(values).all()):
            total = torch.where(torch.isfinite(total), total, owed)
        owed.copy_(total)
        return payload

    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """Zeros but for the sent elements."""
        return self.decompress_add(payload, out.zero_())

    def decompress_add(self, payload: Payload, out: Tensor) -> Tensor:
        """Add the sent elements where they belong."""
        flat = out.view(-1)
        values, places = self._unpack(payload, flat)
        for part in self._chunks(flat.numel()):
            part.of(flat).scatter_add_(1, part.kept(places), part.kept(values))
        return out

    @abstractmethod
    def _pack_values(self, values: Tensor) -> Payload:
        """The fields that stand for the sent elements, flat, chunk by chunk."""

    @abstractmethod
    def _unpack_values(self, payload: Payload, out: Tensor) -> None:
        """Fill ``out`` with the sent elements, as a receiver sees them."""

    def _unpack(self, payload: Payload, like: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.empty(self._sent(like.numel()), dtype=like.dtype, device=like.device)
        self._unpack_values(payload, values)
        return values, unpack_places(payload["places"], values.numel(), self.chunk_size)

    def _chunks(self, numel: int) -> list[Part]:
        rows, rest = divmod(numel, self.chunk_size)
        parts = []
        if rows:
            parts.append(Part(0, rows, self.chunk_size, 0, self.keep))
        if rest:
            parts.append(Part(rows * self.chunk_size, 1, rest, rows * self.keep, min(self.keep, rest)))
        return parts

    def _sent(self, numel: int) -> int:
        rows, rest = divmod(numel, self.chunk_size)
        return rows * self.keep + min(self.keep, rest)

    def _places_field(self, numel: int) -> PayloadField:
        return places_field(self._sent(numel), self.chunk_size)

    def _kept_share(self, shape: Sequence[int] | int) -> float:
        """The least share of a chunk's elements that is sent."""
        numel = shape if isinstance(shape, int) else torch.Size(shape).numel()
        return min((part.keep / part.length for part in self._chunks(numel)), default=1.0)


def places_field(count: int, chunk_size: int) -> PayloadField:
    """The field ``places`` for so many places in chunks of this size: 8, 12 or 16 bits each."""
    return PayloadField("places", torch.uint8, (-(-count * _bits_for(chunk_size) // 8),))


def pack_places(places: Tensor, chunk_size: int) -> Tensor:
    """Places below ``chunk_size`` (int64, flat) as bytes; two of 12 bits make three bytes."""
    bits = _bits_for(chunk_size)
    if bits == 8:
        return places.to(torch.uint8)
    if bits == 16:
        return torch.stack((places & 255, places >> 8), dim=1).to(torch.uint8).view(-1)
    count = places.numel()
    first, second = torch.nn.functional.pad(places, (0, count % 2)).view(-1, 2).unbind(1)
    packed = torch.stack((first & 255, (first >> 8) | ((second & 15) << 4), second >> 4), dim=1)
    return packed.to(torch.uint8).view(-1)[: -(-count * 12 // 8)]


def unpack_places(packed: Tensor, count: int, chunk_size: int) -> Tensor:
    """The ``count`` places (int64) that :func:`pack_places` packed."""
    bits = _bits_for(chunk_size)
    if bits == 8:
        return packed.long()
    if bits == 16:
        low, high = packed.view(-1, 2).long().unbind(1)
        return low | (high << 8)
    a, b, c = torch.nn.functional.pad(packed, (0, -packed.numel() % 3)).view(-1, 3).long().unbind(1)
    return torch.stack((a | ((b & 15) << 8), (b >> 4) | (c << 4)), dim=1).view(-1)[:count]


def _bits_for(chunk_size: int) -> int:
    return 8 if chunk_size <= 1 << 8 else 12 if chunk_size <= 1 << 12 else 16
