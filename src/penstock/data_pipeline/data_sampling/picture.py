"""A picture of how a corpus is distributed over each metric."""

import math
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.files import atomic_file
from penstock.data_pipeline.data_sampling.analysis import Analysis

PICTURES: Final = (".png", ".svg", ".pdf")
_BINS: Final = 60
_CHUNK: Final = 1 << 22
_QUANTILES: Final = (0.05, 0.5, 0.95)


def draw_distributions(analysis: Analysis, path: str | os.PathLike[str]) -> None:
    """Draw a histogram of every metric of an analysis, with the 5th, 50th and 95th percentile marked.

    Args:
        analysis: What to draw.
        path: Where to; ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        ValueError: The suffix is another, matplotlib is not installed, or there are no samples or metrics.
    """
    file = check_picture(path)
    if not analysis.num_samples or not analysis.metrics:
        what = "metric of a sample was" if analysis.num_samples else "samples were"
        raise ValueError(f"{analysis.directory}: no {what} analyzed, so there is nothing to draw")
    from matplotlib.figure import Figure

    columns = min(3, len(analysis.metrics))
    rows = math.ceil(len(analysis.metrics) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    for number, metric in enumerate(analysis.metrics, start=1):
        axes = figure.add_subplot(rows, columns, number)
        values, order = analysis.values(metric), analysis.order(metric)
        edges = bin_edges(values, order)
        axes.stairs(histogram(values, edges), edges, fill=True, color="tab:blue", alpha=0.7)
        marks = [float(values[order[int(q * (len(order) - 1))]]) for q in _QUANTILES]
        for mark, style in zip(marks, (":", "-", ":"), strict=True):
            axes.axvline(mark, color="black", linestyle=style, linewidth=1)
        axes.set_title(metric)
        axes.set_xlabel("5 %, 50 %, 95 %: " + ", ".join(f"{mark:.4g}" for mark in marks))
        axes.set_ylabel("samples")
    with atomic_file(file) as out:
        figure.savefig(out, format=file.suffix[1:])


def check_picture(path: str | os.PathLike[str]) -> Path:
    """Refuse a picture that could not be drawn, before hours of work on what it shows."""
    file = Path(path)
    if file.suffix not in PICTURES:
        raise ValueError(f"{file}: a picture ends in {', '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a picture needs the package matplotlib: pip install 'penstock[report]'") from None
    return file


def bin_edges(values: npt.NDArray[Any], order: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Edges of at most 60 equal bins over all values; of whole numbers each bin has the same number of them."""
    low, high = values[order[0]], values[order[-1]]
    if values.dtype.kind != "f":
        width = max(1, math.ceil((int(high) - int(low) + 1) / _BINS))
        count = math.ceil((int(high) - int(low) + 1) / width)
        return int(low) - 0.5 + width * np.arange(count + 1, dtype=np.float64)
    if low == high:
        return np.array([low - 0.5, high + 0.5])
    return np.linspace(float(low), float(high), _BINS + 1)


def histogram(values: npt.NDArray[Any], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Samples in each bin, read in bounded memory."""
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    for start in range(0, len(values), _CHUNK):
        counts += np.histogram(values[start : start + _CHUNK], edges)[0]
    return counts
