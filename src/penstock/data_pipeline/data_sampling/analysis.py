"""What an analyzer leaves on disk: for each metric its values, and the samples sorted by them."""

import os
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from penstock._core.files import CorruptFileError, atomic_file, read_manifest, write_manifest
from penstock._core.suggest import unknown_name

_KIND: Final = "penstock analysis"


class Analysis:
    """A stored analysis, memory-mapped.

    The directory holds ``NAME.values.npy`` (one number per sample), ``NAME.order.npy`` (int64, the samples sorted by
    it, equal values in sample order) and a manifest with sizes and checksums.

    Attributes:
        directory: Where it lies.
        metrics: Names of the metrics.
        num_samples: How many samples were analyzed.
        num_tokens: How many tokens they have.
    """

    def __init__(self, directory: Path, metrics: tuple[str, ...], num_samples: int, num_tokens: int) -> None:
        self.directory = directory
        self.metrics = metrics
        self.num_samples = num_samples
        self.num_tokens = num_tokens

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Self:
        """Open an analysis.

        Args:
            path: Its directory.
            verify: Check every file's SHA-256 (one pass over the files); their sizes are checked always.

        Raises:
            CorruptFileError: The manifest or a file is missing, cut short or altered.
        """
        directory = Path(path)
        manifest = read_manifest(directory, verify=verify)
        metrics, samples, tokens = manifest.get("metrics"), manifest.get("num_samples"), manifest.get("num_tokens")
        if (
            manifest.get("kind") != _KIND
            or not isinstance(metrics, list)
            or not all(isinstance(name, str) for name in metrics)
            or not isinstance(samples, int)
            or not isinstance(tokens, int)
        ):
            raise CorruptFileError(f"{directory}: its manifest is not that of an analysis")
        for name in metrics:
            for file in (_values_file(name), _order_file(name)):
                if file not in manifest["files"]:
                    raise CorruptFileError(f"{directory}: the manifest does not list {file}")
        return cls(directory, tuple(metrics), samples, tokens)

    def values(self, metric: str) -> npt.NDArray[Any]:
        """The metric of each sample, a read-only view of the file."""
        return self._array(metric, _values_file(metric))

    def order(self, metric: str) -> npt.NDArray[np.int64]:
        """The samples sorted by the metric, int64, a read-only view of the file."""
        return self._array(metric, _order_file(metric))

    def _array(self, metric: str, file: str) -> npt.NDArray[Any]:
        if metric not in self.metrics:
            raise ValueError(f"{self.directory}: {unknown_name('metric', metric, self.metrics)}")
        path = self.directory / file
        try:
            found: npt.NDArray[Any] = np.load(path, mmap_mode="r" if self.num_samples else None, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise CorruptFileError(f"{path}: not a readable array ({error})") from None
        if found.shape != (self.num_samples,):
            raise CorruptFileError(f"{path}: shape {found.shape}, but {self.num_samples} samples were analyzed")
        return found


def write_analysis(
    directory: str | os.PathLike[str], values: dict[str, npt.NDArray[Any]], *, num_samples: int, num_tokens: int
) -> Analysis:
    """Store the values of each metric and the samples sorted by them.

    A manifest from before is removed first: the directory is either sealed and whole, or has no manifest.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    (target / "manifest.json").unlink(missing_ok=True)
    for name, found in values.items():
        _save(target / _values_file(name), found)
        _save(target / _order_file(name), np.argsort(found, kind="stable").astype(np.int64, copy=False))
    files = [file for name in values for file in (_values_file(name), _order_file(name))]
    facts = {"kind": _KIND, "metrics": list(values), "num_samples": num_samples, "num_tokens": num_tokens}
    write_manifest(target, files, **facts)
    return Analysis(target, tuple(values), num_samples, num_tokens)


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with atomic_file(path) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _values_file(metric: str) -> str:
    return f"{metric}.values.npy"


def _order_file(metric: str) -> str:
    return f"{metric}.order.npy"
