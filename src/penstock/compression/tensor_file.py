"""Safetensors files tensor by tensor: memory for one tensor at a time, however large the file."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock._core.files import CorruptFileError, atomic_file

_TYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_FLOATING: Final = frozenset(name for dtype, name in _TYPES.items() if dtype.is_floating_point)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is asked for.

    Args:
        path: A safetensors file.

    Attributes:
        metadata: The file's own.

    Raises:
        CorruptFileError: The file is missing or not a whole safetensors file (a ``ValueError`` that names it).
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise CorruptFileError(f"{path}: no such file")
        try:
            file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CorruptFileError(f"{path}: not a whole safetensors file ({error})") from error
        self._file = file
        self._names: list[str] = list(file.keys())
        self._known = frozenset(self._names)
        self.metadata: dict[str, str] = dict(file.metadata() or {})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def floating_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the floating tensors, read from the header alone."""
        slices = map(self._file.get_slice, self._names)
        return [tuple(found.get_shape()) for found in slices if found.get_dtype() in _FLOATING]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TensorFileWriter:
    """Writes a safetensors file tensor by tensor; it is there, whole, when the ``with`` block ends well.

    The header, which stands first, is known last; so the tensors wait in nameless files beside ``path``, one for each
    size of element (the largest go first: then every tensor is aligned), and are copied behind it.

    Args:
        path: Where to write.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._open = ExitStack()
        self._bodies: dict[int, IO[bytes]] = {}
        self._entries: dict[str, tuple[Tensor, int]] = {}
        self.metadata: dict[str, str] = {}
        self.nbytes = 0

    def __enter__(self) -> Self:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor.

        Raises:
            ValueError: The file format has no such dtype, or the name is taken.
        """
        if tensor.dtype not in _TYPES:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, which a safetensors file cannot hold")
        if name in self._entries:
            raise ValueError(f"a tensor named {name!r} was written already")
        size = tensor.element_size()
        if size not in self._bodies:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 - closed by the stack
            self._bodies[size] = self._open.enter_context(file)
        body = self._bodies[size]
        self._entries[name] = (torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), body.tell())
        data = tensor.detach().cpu().contiguous().view(-1)
        if data.numel():
            body.write(data.view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        sizes = sorted(self._bodies, reverse=True)
        starts, end = {}, 0
        for size in sizes:
            starts[size] = end
            end += self._bodies[size].tell()
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        for name, (like, offset) in sorted(
            self._entries.items(), key=lambda entry: (-entry[1][0].element_size(), entry[1][1])
        ):
            first = starts[like.element_size()] + offset
            span = [first, first + like.numel() * like.element_size()]
            header[name] = {"dtype": _TYPES[like.dtype], "shape": list(like.shape), "data_offsets": span}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with atomic_file(self._path) as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for size in sizes:
                self._bodies[size].seek(0)
                shutil.copyfileobj(self._bodies[size], out, 1 << 20)
        self.nbytes = 8 + len(text) + end
