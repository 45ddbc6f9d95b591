"""An analysis in the files of DeepSpeed's data analyzer, both ways.

For each metric M a directory ``M/`` with indexed datasets in DeepSpeed's dtype codes, all of whole numbers:

- ``M_sample_to_metric``: a row of one number per sample, its value;
- ``M_index_to_metric``: a row of one number per distinct value, rising;
- ``M_index_to_sample``: beside it, the samples of that value;
- ``M_index_to_sample_percentile_merged``: the same samples in about a hundred rows.

Of a metric that accumulates over samples, here a total, it is a single file of one row, ``M_metric_value``.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.files import CorruptFileError
from penstock.data_pipeline.data_sampling.analysis import Analysis, store_analysis
from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.indexed_builder import IndexedDatasetBuilder

_SAMPLE_TO_METRIC: Final = "sample_to_metric"
_INDEX_TO_METRIC: Final = "index_to_metric"
_INDEX_TO_SAMPLE: Final = "index_to_sample"
_MERGED: Final = "index_to_sample_percentile_merged"
_METRIC_VALUE: Final = "metric_value"
_PERCENTILES: Final = 100
_UNSIGNED: Final = (np.uint8, np.uint16, np.uint32, np.uint64)
_SIGNED: Final = (np.int8, np.int16, np.int32, np.int64)


def write_deepspeed(
    analysis: Analysis,
    directory: str | os.PathLike[str],
    metrics: Sequence[str] | None = None,
    *,
    scale: Mapping[str, float] | None = None,
) -> None:
    """Write metrics and totals of an analysis as DeepSpeed's analyzer would, for its sampler.

    Args:
        analysis: What to write.
        directory: Holds a directory for each metric afterwards; DeepSpeed's ``save_path``.
        metrics: Which metrics and totals; all unless given. Totals become rows of numbers, whatever their shape.
        scale: For metrics of floats, which DeepSpeed cannot hold: what to multiply by before rounding. The
            difficulties of a DeepSpeed configuration are then in that unit too.

    Raises:
        ValueError: There are no samples, or a metric of floats has no scale.
    """
    if not analysis.num_samples:
        raise ValueError(f"{analysis.directory}: no samples were analyzed, and DeepSpeed's files cannot be empty")
    scales = dict(scale or {})
    chosen = (*analysis.metrics, *analysis.totals) if metrics is None else tuple(metrics)
    totals = {name: analysis.total(name).reshape(-1) for name in chosen if name in analysis.totals}
    wanted = totals | {name: analysis.values(name) for name in chosen if name not in totals}
    whole = {name: _whole_numbers(name, values, scales.get(name)) for name, values in wanted.items()}
    for name, values in whole.items():
        if name in totals:
            _write_total(Path(directory) / name, name, values)
            continue
        # Scaling keeps the order but may make neighbours equal, and equal values are listed in sample order.
        order = np.argsort(values, kind="stable") if name in scales else analysis.order(name)
        _write_metric(Path(directory) / name, name, values, order)


def read_deepspeed(
    directory: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    metrics: Sequence[str] | None = None,
) -> Analysis:
    """Store what DeepSpeed's analyzer wrote as an analysis of Penstock.

    The values come from ``index_to_metric`` and ``index_to_sample``, which DeepSpeed's sampler goes by.

    Args:
        directory: DeepSpeed's ``save_path``.
        output_dir: Where the analysis goes.
        metrics: Which metrics and totals; every directory that has the files unless given.

    Raises:
        CorruptFileError: A file is missing or damaged, or a sample stands in it twice or never.
        ValueError: There is no metric.
    """
    place = Path(directory)
    found = [*_found(place, _INDEX_TO_SAMPLE), *_found(place, _METRIC_VALUE)]
    names = found if metrics is None else list(metrics)
    accumulated = [name for name in names if (place / name / f"{name}_{_METRIC_VALUE}.idx").is_file()]
    values = {name: _read_metric(place / name, name) for name in names if name not in accumulated}
    if not values:
        raise ValueError(f"{place}: no metric of DeepSpeed's analyzer there (NAME/NAME_{_INDEX_TO_SAMPLE}.idx)")
    counts = {name: len(found) for name, found in values.items()}
    if len(set(counts.values())) != 1:
        raise CorruptFileError(f"{place}: the metrics are of different numbers of samples: {counts}")
    tokens = int(values["seqlen"].sum()) if "seqlen" in values else None
    totals = {name: _read_total(place / name, name) for name in accumulated}
    return store_analysis(output_dir, values, totals=totals, num_tokens=tokens)


def _whole_numbers(name: str, values: npt.NDArray[Any], scale: float | None) -> npt.NDArray[Any]:
    if scale is not None:
        return np.rint(values * scale).astype(np.int64)
    if values.dtype.kind == "f":
        raise ValueError(
            f"metric {name!r} has floats, and DeepSpeed's files hold whole numbers: say what to multiply by, for "
            f"example scale={{{name!r}: 1000}}"
        )
    return values


def _write_metric(place: Path, name: str, values: npt.NDArray[Any], order: npt.NDArray[np.int64]) -> None:
    in_order = values[order]
    starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))
    counts = np.diff(np.append(starts, len(order)))
    of_values = _smallest(int(in_order[0]), int(in_order[-1]))
    of_samples = _smallest(0, len(order) - 1)
    ones = np.ones(len(values), dtype=np.int64)
    # DeepSpeed ends the one document twice where it merges the files of its workers.
    _write(place / f"{name}_{_SAMPLE_TO_METRIC}", values, of_values, ones, ends=2)
    _write(place / f"{name}_{_INDEX_TO_METRIC}", in_order[starts], of_values, ones[: len(starts)], ends=2)
    _write(place / f"{name}_{_INDEX_TO_SAMPLE}", order, of_samples, counts, ends=2)
    step = max(1, len(counts) // _PERCENTILES)
    _write(
        place / f"{name}_{_MERGED}", order, of_samples, np.add.reduceat(counts, np.arange(0, len(counts), step)), ends=1
    )


def _write_total(place: Path, name: str, values: npt.NDArray[Any]) -> None:
    dtype = _smallest(int(values.min()), int(values.max())) if values.size else np.dtype(np.int64)
    _write(place / f"{name}_{_METRIC_VALUE}", values, dtype, np.array([values.size]), ends=1)


def _write(
    prefix: Path, numbers: npt.NDArray[Any], dtype: np.dtype[Any], lengths: npt.NDArray[np.int64], *, ends: int
) -> None:
    with IndexedDatasetBuilder(prefix, dtype, dtype_codes="deepspeed") as builder:
        builder.add_document(numbers.astype(dtype), lengths=lengths.tolist())
        for _ in range(ends - 1):
            builder.end_document()


def _smallest(low: int, high: int) -> np.dtype[Any]:
    """The smallest integer type for a range, unsigned where nothing is negative, as DeepSpeed chooses it."""
    kinds: Iterable[Any] = _UNSIGNED if low >= 0 else _SIGNED
    return next(np.dtype(kind) for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)


def _found(place: Path, kind: str) -> list[str]:
    paths = place.glob(f"*/*_{kind}.idx")
    return sorted(path.parent.name for path in paths if path.name == f"{path.parent.name}_{kind}.idx")


def _read_total(place: Path, name: str) -> npt.NDArray[np.int64]:
    rows = IndexedDataset(place / f"{name}_{_METRIC_VALUE}", dtype_codes="deepspeed")
    if len(rows) != 1:
        raise CorruptFileError(f"{place}: a metric that accumulates is one row, not {len(rows)}")
    return rows[0].astype(np.int64)


def _read_metric(place: Path, name: str) -> npt.NDArray[Any]:
    metric, samples = (
        IndexedDataset(place / f"{name}_{kind}", dtype_codes="deepspeed")
        for kind in (_INDEX_TO_METRIC, _INDEX_TO_SAMPLE)
    )
    rows = samples.lengths
    if len(metric) != len(rows) or not (metric.lengths == 1).all() or not metric.is_contiguous:
        raise CorruptFileError(f"{place}: {len(metric)} values do not go with the samples of {len(rows)}")
    listed = samples.read_range(0, len(samples))[0].astype(np.int64)
    values = np.zeros(len(listed), dtype=np.int64)
    seen = np.zeros(len(listed), dtype=bool)
    if listed.size and not 0 <= int(listed.min()) <= int(listed.max()) < len(listed):
        raise CorruptFileError(f"{place}: {len(listed)} samples are listed, but their numbers run to {listed.max()}")
    values[listed] = np.repeat(metric.tokens[: len(metric)].astype(np.int64), rows)
    seen[listed] = True
    if not seen.all():
        raise CorruptFileError(f"{place}: sample {int((~seen).argmax())} is not listed, and another is twice")
    return values
