"""What is fuzzed: each takes any bytes, and raises only if the code under test does what it never may.

Damaged or malicious files may be refused with ``ValueError`` (of which ``CorruptFileError`` is a kind) and nothing
else, and reading them may take memory in proportion to their size only.
"""

import atexit
import os
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np

from penstock._core.files import read_manifest
from penstock.data_pipeline.configuration import read_mapping
from penstock.data_pipeline.data_sampling import Analysis, SamplingConfig
from penstock.data_pipeline.datasets import IndexedDataset
from penstock.data_pipeline.settings import load_configuration
from penstock.runtime.checkpoint import Checkpoint
from penstock.runtime.config import load_config

_MEMORY: Final = 4 << 20
_MEMORY_PER_BYTE: Final = 400

_shared = Path("/dev/shm")
_place = Path(
    tempfile.mkdtemp(prefix="penstock-fuzz.", dir=_shared if _shared.is_dir() and "TMPDIR" not in os.environ else None)
)
atexit.register(shutil.rmtree, _place, ignore_errors=True)


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Fail if the block takes more memory than a file of ``size`` bytes is worth."""
    tracemalloc.start()
    try:
        yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    limit = _MEMORY + _MEMORY_PER_BYTE * size
    assert peak <= limit, f"{peak} bytes of memory for a file of {size}; at most {limit}"


def idx(data: bytes) -> None:
    """An index of any bytes; the first byte is the length of the ``.bin`` file beside it."""
    tokens, index = data[1 : 1 + data[0]] if data else b"", data[1:]
    (_place / "d.bin").write_bytes(tokens)
    (_place / "d.idx").write_bytes(index)
    for checked in (True, False):
        with bounded(len(data)), suppress(ValueError):
            dataset = IndexedDataset(_place / "d", check_entries=checked)
            bound = len(tokens) // dataset.dtype.itemsize
            for number in range(len(dataset)):
                assert len(dataset[number]) == dataset.lengths[number] <= bound
            if checked:
                flat, offsets = dataset.read_range(0, len(dataset))
                assert len(flat) == offsets[-1]
                assert (np.diff(dataset.document_indices) >= 0).all()


def manifest(data: bytes) -> None:
    """A manifest of any bytes, of a sealed directory, an analysis and a checkpoint."""
    (_place / "manifest.json").write_bytes(data)
    readers: list[Callable[[], object]] = [
        lambda: read_manifest(_place),
        lambda: Analysis.load(_place),
        lambda: [Analysis.load(_place, verify=False).values(name) for name in Analysis.load(_place).metrics],
        lambda: Checkpoint(_place).verify(),
        lambda: Checkpoint(_place).read_state(),
    ]
    for read in readers:
        with bounded(len(data)), suppress(ValueError):
            read()


def config(data: bytes) -> None:
    """A configuration of any bytes, as YAML and as JSON, of a run, a sampler and a pipeline."""
    for suffix in (".yaml", ".json"):
        path = _place / f"config{suffix}"
        path.write_bytes(data)
        readers: list[Callable[[], object]] = [
            lambda path=path: load_config(path),  # type: ignore[misc]
            lambda path=path: load_configuration(path),  # type: ignore[misc]
            lambda path=path: SamplingConfig.model_validate(read_mapping(path)),  # type: ignore[misc]
        ]
        for read in readers:
            with bounded(len(data)), suppress(ValueError):
                read()


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {"idx": idx, "manifest": manifest, "config": config}
