"""Compressed tensors in a file: safetensors with what is needed to decompress in its metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor

from penstock._core.files import CorruptFileError
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.registry import create_compression_algorithm
from penstock.compression.tensor_file import TensorFile, TensorFileWriter

_METADATA_KEY: Final = "penstock.compression"
_FLOATS: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}


class _Entry(BaseModel):
    """One original tensor; ``compressed`` ones are stored as ``INDEX/FIELD``, the others under ``INDEX``."""

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: list[NonNegativeInt]
    dtype: str
    compressed: bool


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int
    algorithm: str
    options: dict[str, Any]
    tensors: list[_Entry]
    metadata: dict[str, str]


def compressed_by(metadata: Mapping[str, str]) -> str | None:
    """The algorithm that a file's metadata says it was compressed with; None for a file that was not.

    A damaged description gives ``"an unknown algorithm"``: the file is compressed all the same.
    """
    if _METADATA_KEY not in metadata:
        return None
    try:
        return _Header.model_validate_json(metadata[_METADATA_KEY]).algorithm
    except ValidationError:
        return "an unknown algorithm"


def write_compressed(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    algorithm: CompressionAlgorithm,
    *,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Compress each floating tensor and write all to one file, atomically, one at a time; returns the file's bytes.

    Tensors that are not floating pass unchanged, as does everything under a lossless algorithm, and a tensor of which
    the payload would hold a NaN or an infinity: one such value (a mask's, or one beyond float16) would spoil others.

    Args:
        path: Where to write.
        tensors: By name.
        algorithm: Any registered algorithm.
        metadata: The original file's own, kept for decompression.
    """
    entries: list[_Entry] = []
    with TensorFileWriter(path) as writer:
        for index, name in enumerate(tensors):
            tensor = tensors[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            payload = algorithm.compress(_computed_in(tensor)) if dtype in _FLOATS and not algorithm.lossless else {}
            compressed = bool(payload) and all(_is_finite(part) for part in payload.values())
            entries.append(_Entry(name=name, shape=list(tensor.shape), dtype=dtype, compressed=compressed))
            if compressed:
                for field, part in payload.items():
                    writer.add(f"{index}/{field}", part)
            else:
                writer.add(str(index), tensor)
        header = _Header(
            version=1,
            algorithm=algorithm.name,
            options=algorithm.options(),
            tensors=entries,
            metadata=dict(metadata or {}),
        )
        writer.metadata[_METADATA_KEY] = header.model_dump_json()
    return writer.nbytes


def decompress_file(path: str | Path, output: str | Path) -> int:
    """Turn a file written by :func:`write_compressed` back into a plain one, tensor by tensor.

    Returns:
        How many tensors it holds.

    Raises:
        CorruptFileError: As :func:`read_compressed`; nothing is written then.
    """
    parts, header, algorithm = _open(path)
    with TensorFileWriter(output) as writer:
        writer.metadata.update(header.metadata)
        for index, entry in enumerate(header.tensors):
            writer.add(entry.name, _restore(path, parts, index, entry, algorithm))
    return len(header.tensors)


def read_compressed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Decompress a file written by :func:`write_compressed`: the tensors, by name, and the original metadata.

    Raises:
        CorruptFileError: The file is missing, broken, not one of these, or its parts do not fit its description.
        ValueError: It was written with an algorithm that is not registered here.
    """
    parts, header, algorithm = _open(path)
    tensors = {entry.name: _restore(path, parts, index, entry, algorithm) for index, entry in enumerate(header.tensors)}
    return tensors, header.metadata


def _open(path: str | Path) -> tuple[TensorFile, _Header, CompressionAlgorithm]:
    parts = TensorFile(path)
    stored_metadata = parts.metadata
    if _METADATA_KEY not in stored_metadata:
        raise CorruptFileError(f"{path}: a safetensors file, but not one written by `penstock compress --output`")
    try:
        header = _Header.model_validate(json.loads(stored_metadata[_METADATA_KEY]))
    except (ValidationError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: its description of the compressed tensors is damaged ({error})") from error
    if header.version != 1:
        raise CorruptFileError(f"{path}: format version {header.version}, but this release reads version 1")
    if len({entry.name for entry in header.tensors}) != len(header.tensors):
        raise CorruptFileError(f"{path}: its description names a tensor twice")
    return parts, header, create_compression_algorithm(header.algorithm, header.options)


def _restore(
    path: str | Path, parts: Mapping[str, Tensor], index: int, entry: _Entry, algorithm: CompressionAlgorithm
) -> Tensor:
    if not entry.compressed:
        tensor = parts.get(str(index))
        if tensor is None or list(tensor.shape) != entry.shape:
            raise CorruptFileError(f"{path}: tensor {entry.name!r} is missing or not of shape {entry.shape}")
        return tensor
    if entry.dtype not in _FLOATS:
        raise CorruptFileError(f"{path}: tensor {entry.name!r} has the unknown dtype {entry.dtype!r}")
    payload: dict[str, Tensor] = {}
    # The parts are checked against the shape before anything of that shape is allocated.
    for field in algorithm.layout_for(entry.shape):
        part = parts.get(f"{index}/{field.name}")
        if part is None or part.dtype != field.dtype or tuple(part.shape) != tuple(field.shape):
            raise CorruptFileError(f"{path}: the {field.name} of tensor {entry.name!r} do not fit shape {entry.shape}")
        payload[field.name] = part
    try:
        out = torch.empty(entry.shape, dtype=_FLOATS[entry.dtype])
    except (RuntimeError, TypeError) as error:  # a shape of no elements may still hold numbers beyond all bounds
        raise CorruptFileError(f"{path}: tensor {entry.name!r} has the impossible shape {entry.shape}") from error
    return algorithm.decompress(payload, _computed_in(out)).to(out.dtype)


def _computed_in(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that torch computes in: floats of 8 bits are for storage."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def _is_finite(part: Tensor) -> bool:
    return not part.is_floating_point() or bool(torch.isfinite(part).all())
