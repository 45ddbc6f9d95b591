"""Measures the difficulty of every sample of a dataset, once, before training."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.suggest import unknown_name
from penstock.data_pipeline.data_sampling.analysis import Analysis, write_analysis
from penstock.data_pipeline.data_sampling.metrics import (
    MetricFunction,
    count_tokens,
    sequence_length,
    vocabulary_rarity,
)
from penstock.data_pipeline.data_sampling.ragged import RaggedBatch, ragged_batches

SEQUENCE_LENGTH: Final = "seqlen"
VOCABULARY_RARITY: Final = "vocabularyrarity"
KNOWN_METRICS: Final = (SEQUENCE_LENGTH, VOCABULARY_RARITY)

Progress = Callable[[str, int, int], object]


class DataAnalyzer:
    """Computes difficulty metrics of all samples and stores them for a curriculum.

    The dataset is read once, or twice if a metric needs token counts of the whole corpus first. Memory is bounded by
    ``batch_tokens`` and 16 bytes per sample and metric.

    Args:
        dataset: Any map-style dataset whose samples are sequences of tokens. :class:`IndexedDataset` and
            :class:`TokenWindows` are read without a call per sample.
        metrics: Names: ``seqlen`` (tokens of a sample) and ``vocabularyrarity`` (mean of ``-log p(token)`` in nats,
            with ``p`` the token's frequency in the dataset).
        output_dir: Where :meth:`run` stores the analysis.
        metric_functions: More metrics by name: functions from ``(tokens, offsets)`` of many samples to an array of one
            number per sample, where sample ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``.
        tokens_of: From sample to tokens, where samples are not plain sequences of tokens. By default a dictionary's
            ``input_ids``.
        vocabulary_size: Token numbers from here on are refused.
        batch_tokens: Tokens held in memory at once.
        progress: Called as ``progress(what, samples_done, samples)`` now and then.

    Raises:
        ValueError: A metric is unknown or named twice, or an argument is out of range.
    """

    def __init__(
        self,
        dataset: Any,
        metrics: Sequence[str] = KNOWN_METRICS,
        output_dir: str | os.PathLike[str] = "analysis",
        *,
        metric_functions: Mapping[str, MetricFunction] | None = None,
        tokens_of: Callable[[Any], Any] | None = None,
        vocabulary_size: int | None = None,
        batch_tokens: int = 1 << 20,
        progress: Progress | None = None,
    ) -> None:
        self.dataset = dataset
        self.output_dir = Path(output_dir)
        self._user_metrics = dict(metric_functions or {})
        self.metrics = (*metrics, *self._user_metrics)
        for name in metrics:
            if name not in KNOWN_METRICS:
                raise ValueError(f"{unknown_name('metric', name, KNOWN_METRICS)}; others go into metric_functions")
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"name each metric once, and at least one; got {list(self.metrics)}")
        for name in self.metrics:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"a metric's name becomes a file's: letters, digits, - and _ only; got {name!r}")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        if vocabulary_size is not None and vocabulary_size < 1:
            raise ValueError(f"vocabulary_size must be at least 1, got {vocabulary_size}")
        self._tokens_of = tokens_of
        self._vocabulary_size = vocabulary_size
        self._batch_tokens = batch_tokens
        self._progress = progress

    def run(self) -> Analysis:
        """Read the dataset, compute the metrics and store them in ``output_dir``.

        Returns:
            The stored analysis; :meth:`load` opens it again.

        Raises:
            ValueError: A sample's tokens are not integers or beyond the vocabulary, or a metric function returns
                something other than one finite number per sample.
        """
        functions: dict[str, MetricFunction] = {}
        for name in self.metrics:
            if name == SEQUENCE_LENGTH:
                functions[name] = sequence_length
            elif name == VOCABULARY_RARITY:
                functions[name] = vocabulary_rarity(self.count_tokens())
            else:
                functions[name] = self._user_metrics[name]
        values: dict[str, npt.NDArray[Any]] = {}
        tokens = 0
        for batch in self._batches("metrics"):
            tokens += int(batch.offsets[-1])
            for name, function in functions.items():
                found = _checked(name, function(batch.tokens, batch.offsets), batch)
                if name not in values:
                    values[name] = np.empty(len(self.dataset), dtype=_storage(found.dtype))
                values[name][batch.start : batch.stop] = found
        for name in functions:
            values.setdefault(name, np.empty(0, dtype=np.float64))
        return write_analysis(self.output_dir, values, num_samples=len(self.dataset), num_tokens=tokens)

    def count_tokens(self) -> npt.NDArray[np.int64]:
        """How often each token number occurs in the dataset: int64, one pass."""
        counts = np.zeros(self._vocabulary_size or 0, dtype=np.int64)
        for batch in self._batches("token counts"):
            counts = count_tokens(batch.tokens, counts, self._vocabulary_size)
        return counts

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Analysis:
        """Open a stored analysis; see :meth:`Analysis.load`."""
        return Analysis.load(path)

    def _batches(self, what: str) -> Iterator[RaggedBatch]:
        for batch in ragged_batches(self.dataset, batch_tokens=self._batch_tokens, tokens_of=self._tokens_of):
            yield batch
            if self._progress is not None:
                self._progress(what, batch.stop, len(self.dataset))


def _storage(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Whole numbers are stored as int64 and others as float64: a later batch may hold larger ones than the first."""
    return np.dtype(np.int64 if dtype.kind in "biu" else np.float64)


def _checked(name: str, values: Any, batch: RaggedBatch) -> npt.NDArray[Any]:
    found = np.asarray(values)
    if found.shape != (len(batch),) or found.dtype.kind not in "biuf":
        raise ValueError(
            f"metric {name!r} must give one number for each of {len(batch)} samples, got {found.dtype} of shape "
            f"{found.shape}"
        )
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        bad = batch.start + int((~np.isfinite(found)).argmax())
        raise ValueError(f"metric {name!r} gives sample {bad} the value {found[bad - batch.start]}")
    return found
