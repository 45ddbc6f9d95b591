"""One message per hop: header, structure, tensor descriptions and data in one frame.

::

    0        64                 ..                     aligned to 64
    | header | positions (int64) | preamble (JSON bytes) | tensor | tensor | ...

The *preamble* is the value's structure with dtype, shape and flags of each tensor. It repeats while shapes do, so both
sides keep what follows from it. Nothing else about the peer's next message is assumed: structure, shapes and dtypes
may change at every micro-batch. Each tensor starts at a multiple of 64 bytes.

Where tensors live on a GPU, their data travels apart from the frame, in a *payload* of the same form; the frame
then ends with the preamble and says how long the payload is.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.pipe.buffers import ALIGNMENT
from penstock.pipe.value import Structure, structure_from_json, structure_to_json

HEADER_BYTES: Final = 64
_HEADER: Final = struct.Struct("<4sHBBqqqqIIQ")
_MAGIC: Final = b"PSTK"
_VERSION: Final = 1
_CACHE_LIMIT: Final = 512

_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.bool, torch.complex64, torch.complex128),
    )
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


class FrameError(ValueError):
    """A frame is not what its receiver expected: damaged, or of another step, micro-batch or direction."""


class Address(NamedTuple):
    """What a frame carries, for which stage.

    Attributes:
        direction: ``"F"`` for a stage's input, ``"B"`` for the gradient of a stage's output.
        stage: The stage that receives it.
        step: Optimizer step.
        micro_batch: Index of the micro-batch in the global batch.
    """

    direction: str
    stage: int
    step: int
    micro_batch: int

    def __str__(self) -> str:
        kind = "activation" if self.direction == "F" else "gradient"
        return f"{kind} for stage {self.stage}, step {self.step}, micro-batch {self.micro_batch}"


class Header(NamedTuple):
    """The fixed part of a frame.

    Attributes:
        address: What the frame carries, for which stage.
        positions: How many sample positions follow.
        preamble_bytes: Length of the preamble.
        inline_bytes: Length of the tensors in the frame.
        apart_bytes: Length of the payload that travels apart.
    """

    address: Address
    positions: int
    preamble_bytes: int
    inline_bytes: int
    apart_bytes: int

    @property
    def data_start(self) -> int:
        """Where the tensors start, in bytes."""
        return _align(HEADER_BYTES + 8 * self.positions + self.preamble_bytes)

    @property
    def frame_bytes(self) -> int:
        """Length of the whole frame."""
        return self.data_start + self.inline_bytes

    def write(self, frame: memoryview) -> None:
        """Pack into the first bytes of a frame."""
        where = self.address
        _HEADER.pack_into(
            *(frame, 0, _MAGIC, _VERSION, ord(where.direction), 0, where.stage, where.step, where.micro_batch),
            *(self.inline_bytes, self.positions, self.preamble_bytes, self.apart_bytes),
        )

    @classmethod
    def read(cls, frame: memoryview, expected: Address) -> "Header":
        """Unpack, and check that the frame is the one expected.

        Raises:
            FrameError: The bytes are no frame of this version, or the frame is another one; both are named.
        """
        magic, version, direction, _, stage, step, micro_batch, inline, positions, preamble, apart = (
            _HEADER.unpack_from(frame)
        )
        if magic != _MAGIC or version != _VERSION:
            raise FrameError(f"expected the {expected}, but {_no_frame(frame)}")
        if (stage, step, micro_batch) != expected[1:] or direction != ord(expected.direction):
            raise FrameError(
                f"expected the {expected}, but received the {Address(chr(direction), stage, step, micro_batch)}; "
                "all ranks must be given the same step, schedule and micro-batches"
            )
        if inline < 0 or apart < 0:
            raise FrameError(f"the {expected} arrived damaged: negative lengths")
        return cls(expected, positions, preamble, inline, apart)


def frame_length(head: memoryview) -> int:
    """Length of a whole frame in bytes, by its first ``HEADER_BYTES``.

    Raises:
        FrameError: They are not those of a frame.
    """
    magic, version, _, _, _, _, _, inline, positions, preamble, _ = _HEADER.unpack_from(head)
    if magic != _MAGIC or version != _VERSION or inline < 0:
        raise FrameError(_no_frame(head))
    return _align(HEADER_BYTES + 8 * positions + preamble) + int(inline)


@dataclass(frozen=True, slots=True)
class Layout:
    """What follows from a preamble: the structure, and where each tensor lies.

    Attributes:
        structure: See :mod:`penstock.pipe.value`.
        places: Of each tensor: dtype, shape, number of elements, offset in bytes from the start of the frame's data or
            of the payload, and whether it travels in the payload.
        requires_grad: For each tensor, whether the sender wants its gradient.
        inline_bytes: Length of the tensors in the frame.
        apart_bytes: Length of the payload.
        preamble: The bytes that say all this.
    """

    structure: Structure
    places: tuple[tuple[torch.dtype, tuple[int, ...], int, int, bool], ...]
    requires_grad: tuple[bool, ...]
    inline_bytes: int
    apart_bytes: int
    preamble: bytes

    def header(self, address: Address, positions: Sequence[int]) -> Header:
        """The header of a frame with this layout."""
        return Header(address, len(positions), len(self.preamble), self.inline_bytes, self.apart_bytes)


class LayoutCache:
    """Layouts by what they are made from, so that repeating shapes cost a look-up. Bounded."""

    def __init__(self) -> None:
        self._by_value: dict[Any, Layout] = {}
        self._by_preamble: dict[bytes, Layout] = {}

    def of(self, structure: Structure, tensors: Sequence[Tensor], apart: Sequence[bool]) -> Layout:
        """The layout of a value about to be sent.

        Raises:
            ValueError: A tensor's dtype cannot be sent.
        """
        facts = tuple((tensor.dtype, tensor.shape, tensor.requires_grad) for tensor in tensors)
        key = (structure, facts, tuple(apart))
        layout = self._by_value.get(key)
        if layout is None:
            for dtype, _, _ in facts:
                if dtype not in _NAMES:
                    raise ValueError(f"a tensor of {dtype} cannot be sent between stages; known: {', '.join(_DTYPES)}")
            described = [
                [_NAMES[dtype], list(shape), int(grad), int(away)]
                for (dtype, shape, grad), away in zip(facts, apart, strict=True)
            ]
            text = json.dumps([structure_to_json(structure), described], separators=(",", ":"))
            layout = _layout(structure, described, text.encode())
            _remember(self._by_value, key, layout)
        return layout

    def parse(self, preamble: bytes) -> Layout:
        """The layout of a value just received.

        Raises:
            FrameError: The preamble does not make sense.
        """
        layout = self._by_preamble.get(preamble)
        if layout is None:
            try:
                structure, described = json.loads(preamble)
                layout = _layout(structure_from_json(structure), described, preamble)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise FrameError(
                    f"a frame arrived with a damaged preamble ({type(error).__name__}: {error})"
                ) from error
            _remember(self._by_preamble, preamble, layout)
        return layout


def write_head(frame: memoryview, header: Header, preamble: bytes, positions: Sequence[int]) -> None:
    """Write what comes before the tensors."""
    header.write(frame)
    at = HEADER_BYTES
    if positions:
        at += 8 * len(positions)
        frame[HEADER_BYTES:at] = np.asarray(positions, dtype=np.int64).tobytes()
    frame[at : at + len(preamble)] = preamble


def copy_into(places: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy tensors, which may require gradients, to their places in a frame or payload."""
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor.detach() if tensor.requires_grad else tensor)


def read_positions(frame: memoryview, header: Header) -> tuple[int, ...]:
    """The sample positions that a frame carries."""
    if not header.positions:
        return ()
    return tuple(np.frombuffer(frame, dtype=np.int64, count=header.positions, offset=HEADER_BYTES).tolist())


def read_layout(frame: memoryview, header: Header, cache: LayoutCache) -> Layout:
    """The layout that a frame's preamble describes, checked against the header."""
    start = HEADER_BYTES + 8 * header.positions
    layout = cache.parse(bytes(frame[start : start + header.preamble_bytes]))
    if (layout.inline_bytes, layout.apart_bytes) != (header.inline_bytes, header.apart_bytes):
        raise FrameError(
            f"the {header.address} arrived damaged: its header announces {header.inline_bytes} bytes and "
            f"{header.apart_bytes} apart, its preamble {layout.inline_bytes} and {layout.apart_bytes}"
        )
    return layout


def views(frame: npt.NDArray[np.uint8], payload: Tensor | None, data_start: int, layout: Layout) -> list[Tensor]:
    """The tensors that lie in a frame and its payload. Each has its own version counter: none is a view to autograd."""
    result = []
    for dtype, shape, count, offset, apart in layout.places:
        if apart:
            assert payload is not None
            empty = torch.empty(0, dtype=dtype, device=payload.device)
            strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
            result.append(empty.set_(payload.untyped_storage(), offset // dtype.itemsize, shape, strides))
        elif count:
            flat = torch.frombuffer(frame, dtype=dtype, count=count, offset=data_start + offset)
            result.append(flat.resize_(shape))  # to as many elements: only the shape changes
        else:
            result.append(torch.empty(shape, dtype=dtype))
    return result


def _layout(structure: Structure, described: list[list[Any]], preamble: bytes) -> Layout:
    ends = [0, 0]  # of the tensors in the frame, and of those apart
    places = []
    for name, shape, _, apart in described:
        dtype, count = _DTYPES[name], prod(shape)
        places.append((dtype, tuple(shape), count, ends[apart], bool(apart)))
        # An empty tensor has a place too: a payload without bytes could not hold it.
        ends[apart] += _align(max(1, count * dtype.itemsize))
    return Layout(
        structure=structure,
        places=tuple(places),
        requires_grad=tuple(bool(grad) for _, _, grad, _ in described),
        inline_bytes=ends[0],
        apart_bytes=ends[1],
        preamble=preamble,
    )


def _no_frame(message: memoryview) -> str:
    return (
        f"the message is no frame of version {_VERSION} (it begins with {bytes(message[:6]).hex()}); "
        "all ranks must run the same version of penstock"
    )


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _remember(cache: dict[Any, Layout], key: Any, layout: Layout) -> None:
    if len(cache) >= _CACHE_LIMIT:  # shapes that never repeat would fill memory; those that do are soon back
        cache.clear()
    cache[key] = layout
