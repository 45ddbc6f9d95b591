"""Reading a complete checkpoint."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from penstock._core.files import MANIFEST_NAME, CorruptFileError, read_manifest, sha256_of
from penstock._core.sharded import here
from penstock.runtime.checkpoint.names import FORMAT, FORMAT_VERSION, STATE_NAME, layer_file, rank_file, step_name
from penstock.runtime.sharding.tensors import local_part


class Checkpoint:
    """A complete checkpoint, for reading. Files are checked against the manifest as they are read.

    Args:
        path: The checkpoint's directory.

    Attributes:
        step: Optimizer steps completed.
        layers: Canonical layers that it holds, sorted.
        ranks: Ranks whose error memories it holds, sorted.

    Raises:
        CorruptFileError: There is no manifest (the checkpoint is incomplete), or it is not a checkpoint's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / MANIFEST_NAME).is_file():
            raise CorruptFileError(f"{self.path}: not a complete checkpoint (no {MANIFEST_NAME})")
        manifest = read_manifest(self.path, verify=False)
        if manifest.get("format") != FORMAT or not isinstance(manifest.get("step"), int):
            raise CorruptFileError(f"{self.path / MANIFEST_NAME}: not the manifest of a {FORMAT}")
        if manifest.get("version") != FORMAT_VERSION:
            raise CorruptFileError(
                f"{self.path}: checkpoint format version {manifest.get('version')!r}; "
                f"this Penstock reads version {FORMAT_VERSION}"
            )
        self.step: int = manifest["step"]
        if self.path.name.startswith("step_") and not self.path.name.startswith(step_name(self.step)):
            raise CorruptFileError(f"{self.path}: its manifest is that of step {self.step}")
        self._files: dict[str, dict[str, Any]] = manifest["files"]
        self.layers = self._numbers(r"layer_(\d{3,})\.safetensors")
        self.ranks = self._numbers(r"errors_rank_(\d{3,})\.safetensors")

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a canonical layer, in fresh memory on the CPU.

        Raises:
            CorruptFileError: The layer is not in the checkpoint, or its file is altered.
        """
        if layer not in self.layers:
            raise CorruptFileError(
                f"{self.path}: holds no layer {layer}; it holds {len(self.layers)} layers, {_span(self.layers)}"
            )
        return self._read(layer_file(layer))

    def read_rank(self, rank: int) -> dict[str, Tensor]:
        """The error memories of a rank.

        Raises:
            CorruptFileError: The rank is not in the checkpoint, or its file is altered.
        """
        if rank not in self.ranks:
            raise CorruptFileError(
                f"{self.path}: holds no error memories of rank {rank}; it holds those of {len(self.ranks)} ranks, "
                f"{_span(self.ranks)}"
            )
        return self._read(rank_file(rank))

    def read_state(self) -> dict[str, Any]:
        """The JSON state that was sealed into the checkpoint."""
        data = self._bytes(STATE_NAME)
        try:
            state = json.loads(data)
        except ValueError as error:
            raise CorruptFileError(f"{self.path / STATE_NAME}: not valid JSON ({error})") from error
        if not isinstance(state, dict):
            raise CorruptFileError(f"{self.path / STATE_NAME}: not a table of names")
        return state

    def verify(self, *, checksums: bool = True) -> None:
        """Check every file, or with ``checksums=False`` only that each is there in its size.

        Raises:
            CorruptFileError: A file is missing, of another size or altered.
        """
        for name in self._files:
            self._check_size(name)
            if checksums:
                self._check_digest(name, sha256_of(self.path / name))

    def _numbers(self, pattern: str) -> tuple[int, ...]:
        return tuple(sorted(int(found[1]) for name in self._files if (found := re.fullmatch(pattern, name))))

    def _read(self, name: str) -> dict[str, Tensor]:
        try:
            # From the bytes that were checked and not from a memory map, which would follow later changes of the file.
            return safetensors.torch.load(self._bytes(name))
        except SafetensorError as error:
            raise CorruptFileError(f"{self.path / name}: not a safetensors file ({error})") from error

    def _check_size(self, name: str) -> None:
        path, listed = self.path / name, self._files[name]["bytes"]
        if not path.is_file():
            raise CorruptFileError(f"{path}: listed in the manifest but missing")
        if path.stat().st_size != listed:
            raise CorruptFileError(f"{path}: {path.stat().st_size} bytes, but the manifest lists {listed}")

    def _check_digest(self, name: str, sha256: str) -> None:
        if sha256 != self._files[name]["sha256"]:
            raise CorruptFileError(f"{self.path / name}: its SHA-256 differs from the manifest's; the file was altered")

    def _bytes(self, name: str) -> bytes:
        """A file's bytes, as they were written."""
        if name not in self._files:
            raise CorruptFileError(f"{self.path / name}: not listed in the checkpoint's manifest")
        self._check_size(name)
        data = (self.path / name).read_bytes()
        self._check_digest(name, hashlib.sha256(data).hexdigest())
        return data


def copy_into(target: Tensor, source: Tensor, name: str) -> None:
    """Copy a loaded tensor into existing storage, whose alignment is part of a bitwise equal resume.

    Args:
        target: The tensor of the model or the optimizer; its shape and dtype must be the checkpoint's. Where it lies
            in parts on several ranks, this rank's part is taken.
        source: The tensor of the checkpoint.
        name: Its name, for the error.

    Raises:
        ValueError: Shape or dtype differ.
    """
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(
            f"{name}: the checkpoint holds {_kind(source)}, but this run needs {_kind(target)}; "
            "build the model and precision that the checkpoint was made with"
        )
    with torch.no_grad():
        here(target).copy_(local_part(source, target))


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _span(numbers: tuple[int, ...]) -> str:
    return f"{numbers[0]}..{numbers[-1]}" if numbers else "none"
