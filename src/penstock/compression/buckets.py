"""Many small tensors as a few flat buffers, so that a collective or a compressor handles them together."""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from penstock._core.sharded import here
from penstock.compression.chunks import Part

ALIGNMENT_BYTES: Final = 64
"""Every view starts on a cache line: an unaligned matrix can change bits of a product."""
DEFAULT_BUCKET_BYTES: Final = 25 * 2**20

NamedParameter = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Bucket:
    """Where some parameters lie in a flat buffer: of those that are divided over ranks, the part on this one.

    Attributes:
        names: The parameters' names.
        parameters: The parameters.
        offsets: Element at which each starts.
        numel: Elements of the buffer, the gaps between parameters included.
        dtype: Of the buffer.
        device: Of the buffer.
        set_index: Which of the caller's sets the parameters come from.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    offsets: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    device: torch.device
    set_index: int

    @property
    def parts(self) -> list[Part]:
        """Where the parameters lie, and their shapes."""
        return [Part(start, tuple(here(p).shape)) for start, p in zip(self.offsets, self.parameters, strict=True)]

    @property
    def key(self) -> int:
        """What keys random choices in it: its shapes, which the copies of a tied weight share on all stages."""
        return zlib.crc32(repr([tuple(parameter.shape) for parameter in self.parameters]).encode())

    def new_flat(self) -> Tensor:
        """A buffer of zeros, ``[numel]``."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view of the parameter's shape into ``flat`` for each parameter."""
        return [
            flat[start : start + part.numel()].view(part.shape)
            for start, part in zip(self.offsets, map(here, self.parameters), strict=True)
        ]

    def gaps(self, flat: Tensor) -> list[Tensor]:
        """Views of the elements between the parameters; empty ones left out."""
        ends = [start + here(p).numel() for start, p in zip(self.offsets, self.parameters, strict=True)]
        starts = [*self.offsets[1:], self.numel]
        return [flat[end:start] for end, start in zip(ends, starts, strict=True) if end < start]


def make_buckets(
    parameter_sets: Sequence[Iterable[NamedParameter]],
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    flat_dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
    reverse: bool = True,
) -> list[Bucket]:
    """Lay parameters out in buckets: a pure function of their order, shapes and dtypes.

    Parameters of different sets, dtypes or devices never share a bucket. A parameter larger than ``bucket_bytes``
    has a bucket to itself.

    Args:
        parameter_sets: Named parameters; a tied weight belongs in a set by itself, because what shares a bucket
            shares scales, and its copies on other stages have other neighbours.
        bucket_bytes: A bucket is closed when another parameter would make it larger.
        flat_dtype: The dtype of the buffer for a parameter's dtype.
        reverse: Take each set's parameters from the last to the first, the order in which a backward pass
            finishes their gradients.

    Raises:
        ValueError: ``bucket_bytes`` is not positive, or a parameter appears twice.
    """
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes must be positive, got {bucket_bytes}")
    owner: dict[nn.Parameter, str] = {}
    buckets: list[Bucket] = []
    for set_index, parameters in enumerate(parameter_sets):
        named = list(parameters)
        for name, parameter in named:
            if parameter in owner:
                raise ValueError(f"parameter {name!r} is listed twice (first as {owner[parameter]!r})")
            owner[parameter] = name
        kinds: dict[tuple[torch.dtype, torch.device], list[NamedParameter]] = {}
        for name, parameter in reversed(named) if reverse else named:
            kinds.setdefault((parameter.dtype, parameter.device), []).append((name, parameter))
        for (dtype, device), members in kinds.items():
            buckets += _fill(members, bucket_bytes, flat_dtype(dtype), device, set_index)
    return buckets


def _fill(
    members: list[NamedParameter], bucket_bytes: int, dtype: torch.dtype, device: torch.device, set_index: int
) -> list[Bucket]:
    buckets: list[Bucket] = []
    open_members: list[NamedParameter] = []
    offsets: list[int] = []
    end = 0

    def close() -> None:
        names, parameters = zip(*open_members, strict=True)
        buckets.append(Bucket(names, parameters, tuple(offsets), end, dtype, device, set_index))

    for name, parameter in members:
        size = _aligned(here(parameter).numel(), dtype.itemsize)
        if open_members and (end + size) * dtype.itemsize > bucket_bytes:
            close()
            open_members, offsets, end = [], [], 0
        open_members.append((name, parameter))
        offsets.append(end)
        end += size
    if open_members:
        close()
    return buckets


def _aligned(numel: int, itemsize: int) -> int:
    unit = ALIGNMENT_BYTES // math.gcd(ALIGNMENT_BYTES, itemsize)
    return -(-numel // unit) * unit
