"""Writing one checkpoint, by all ranks together."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from penstock._core.files import CorruptFileError, atomic_file, sync_directory, write_json, write_manifest
from penstock.runtime.checkpoint.names import (
    FORMAT,
    FORMAT_VERSION,
    PARTIAL,
    REPLACED,
    STATE_NAME,
    layer_file,
    rank_file,
    step_name,
)


class CheckpointWriter:
    """Writes one checkpoint; made by every rank for the same directory and step.

    Args:
        directory: Where the run's checkpoints lie.
        step: Optimizer steps completed.

    Attributes:
        path: The checkpoint's directory, which is there once the checkpoint is complete.
        written: Names of the files that this rank wrote, for the ``expected_files`` of the rank that seals.
    """

    def __init__(self, directory: str | os.PathLike[str], step: int) -> None:
        if step < 0:
            raise ValueError(f"a checkpoint's step must be at least 0, got {step}")
        self.step = step
        self.path = Path(directory) / step_name(step)
        self._partial = self.path.with_name(self.path.name + PARTIAL)
        self._partial.mkdir(parents=True, exist_ok=True)
        self.written: list[str] = []

    def write_layer(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a canonical layer's tensors, under names such as ``weight:layer_003.attn.qkv.weight``."""
        self._write(layer_file(layer), tensors)

    def write_rank(self, rank: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what belongs to a rank: its error memories."""
        self._write(rank_file(rank), tensors)

    def seal(self, state: Mapping[str, Any], expected_files: Iterable[str]) -> Path:
        """Make the checkpoint complete. One rank calls this, after all ranks have written.

        A complete checkpoint of the same step is replaced; until the new one is in place, the old one can be found.

        Args:
            state: JSON values, stored as ``state.json``.
            expected_files: Names of all files that the ranks wrote.

        Returns:
            The checkpoint's directory.

        Raises:
            CorruptFileError: An expected file is missing; the checkpoint stays incomplete.
        """
        names = {*expected_files, STATE_NAME}
        write_json(self._partial / STATE_NAME, dict(state))
        for name in sorted(names):
            if not (self._partial / name).is_file():
                raise CorruptFileError(f"{self._partial / name}: no rank wrote this file of the checkpoint")
        for left in self._partial.iterdir():  # by a run that was killed while it wrote this step
            if left.name not in names:
                left.unlink()
        write_manifest(self._partial, names, format=FORMAT, version=FORMAT_VERSION, step=self.step)
        return self._put_in_place()

    def _put_in_place(self) -> Path:
        replaced = self.path.with_name(self.path.name + REPLACED)
        if self.path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            self.path.rename(replaced)
        self._partial.rename(self.path)
        sync_directory(self.path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return self.path

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        payload = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
        with atomic_file(self._partial / name) as file:
            file.write(safetensors.torch.save(_without_sharing(payload)))
        self.written.append(name)


def _without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors that lie in one storage (views of a flat bucket) storages of their own, as safetensors demands."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        fresh = whole and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        result[name] = tensor if fresh else tensor.clone()
    return result
