"""Merging, splitting and checking indexed datasets, in bounded memory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.datasets.indexed import IndexedDataset, bin_path, idx_path
from penstock.data_pipeline.datasets.indexed_builder import IndexedDatasetBuilder

_CHUNK: Final = 1 << 22


def merge_indexed(
    sources: Sequence[str | os.PathLike[str] | IndexedDataset],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> IndexedDataset:
    """Write several indexed datasets one after another into one, with their documents.

    Args:
        sources: At least one; all of one dtype, and all with modes or all without.
        output: Path prefix of the result.
        overwrite: Replace what is there.

    Raises:
        ValueError: There is no source, they differ in kind, or there is a dataset at ``output`` already.
    """
    if not sources:
        raise ValueError("nothing to merge: name at least one dataset")
    _check_free([output], overwrite)
    opened = [source if isinstance(source, IndexedDataset) else IndexedDataset(source) for source in sources]
    multimodal = any(part.modes is not None for part in opened)
    with IndexedDatasetBuilder(output, opened[0].dtype, multimodal=multimodal) as builder:
        for part in opened:
            builder.add_index(part)
    return IndexedDataset(output)


def split_indexed(
    source: str | os.PathLike[str] | IndexedDataset,
    outputs: Sequence[str | os.PathLike[str]],
    shares: Sequence[float] | None = None,
    *,
    overwrite: bool = False,
) -> list[IndexedDataset]:
    """Cut an indexed dataset between documents into several, in order.

    Each cut is made at the document boundary that is nearest to where the share of tokens ends.

    Args:
        source: The dataset, or its path prefix.
        outputs: Path prefixes of the parts.
        shares: Of the tokens for each part, in any unit; equal unless given.
        overwrite: Replace what is there.

    Raises:
        ValueError: Shares and outputs differ in number, a share is not positive, a path is named twice, or there is a
            dataset already.
    """
    weights = np.ones(len(outputs)) if shares is None else np.asarray(shares, dtype=np.float64)
    if len(outputs) < 1 or weights.shape != (len(outputs),) or not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(f"{len(outputs)} parts need as many positive shares, got {weights.tolist()}")
    if len({bin_path(output) for output in outputs}) != len(outputs):
        raise ValueError(f"the parts need different paths, got {', '.join(map(str, outputs))}")
    _check_free(outputs, overwrite)
    dataset = source if isinstance(source, IndexedDataset) else IndexedDataset(source)
    cuts = _cuts(dataset, weights / weights.sum())
    for output, start, stop in zip(outputs, [0, *cuts], [*cuts, dataset.num_documents], strict=True):
        with IndexedDatasetBuilder(output, dataset.dtype, multimodal=dataset.modes is not None) as builder:
            builder.add_documents(dataset, start, stop)
    return [IndexedDataset(output) for output in outputs]


@dataclass(frozen=True)
class TokenCheck:
    """What reading every token of an indexed dataset finds.

    Attributes:
        smallest: The smallest token; 0 where there is none.
        largest: The largest token.
        empty: Sequences without tokens.
        problems: What is wrong, in words; empty when nothing is.
    """

    smallest: float
    largest: float
    empty: int
    problems: list[str]


def check_tokens(dataset: IndexedDataset) -> TokenCheck:
    """Read every token, and account for every byte of the ``.bin`` file."""
    problems = []
    claimed = int(dataset.lengths.sum(dtype=np.int64)) * dataset.dtype.itemsize
    held = bin_path(dataset.path_prefix).stat().st_size
    if claimed != held:
        problems.append(
            f"{bin_path(dataset.path_prefix)}: {held} bytes, but the sequences take {claimed}: "
            + ("some bytes belong to no sequence" if claimed < held else "sequences overlap")
        )
    elif not dataset.is_contiguous:
        problems.append(f"{idx_path(dataset.path_prefix)}: the sequences do not lie one after another")
    tokens = dataset.tokens
    low: Any = tokens[0] if len(tokens) else 0
    high = low
    for start in range(0, len(tokens), _CHUNK):
        part: npt.NDArray[Any] = tokens[start : start + _CHUNK]
        low, high = min(low, part.min()), max(high, part.max())
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            at = start + int((~np.isfinite(part)).argmax())
            problems.append(f"{bin_path(dataset.path_prefix)}: token {at} is {tokens[at]}")
            break
    if low < 0:
        problems.append(f"{bin_path(dataset.path_prefix)}: the smallest token is {low}; token numbers begin at 0")
    return TokenCheck(low, high, int(np.count_nonzero(dataset.lengths == 0)), problems)


def _cuts(dataset: IndexedDataset, shares: npt.NDArray[np.float64]) -> list[int]:
    """The documents at which all parts but the first begin."""
    ends = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])[dataset.document_indices]
    aims = np.cumsum(shares)[:-1] * int(ends[-1])
    after = np.searchsorted(ends, aims)
    before = np.maximum(after - 1, 0)
    return [int(cut) for cut in np.where(aims - ends[before] < ends[after] - aims, before, after)]


def _check_free(outputs: Sequence[str | os.PathLike[str]], overwrite: bool) -> None:
    there: list[Path] = [path for output in outputs for path in (bin_path(output), idx_path(output)) if path.exists()]
    if there and not overwrite:
        raise ValueError(
            f"{', '.join(map(str, there))}: there already; say overwrite (--overwrite), or write elsewhere"
        )
