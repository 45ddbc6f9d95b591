"""Measures the difficulty of every sample of a dataset, once, before training."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.files import MANIFEST_NAME
from penstock._core.suggest import unknown_name
from penstock.data_pipeline.data_sampling.analysis import Analysis, analyzing, put_in_place, seal_analysis, sealed_key
from penstock.data_pipeline.data_sampling.engines import Engine, check_engine, map_ranges
from penstock.data_pipeline.data_sampling.fingerprint import fingerprint
from penstock.data_pipeline.data_sampling.measurement import Form, Measurement
from penstock.data_pipeline.data_sampling.metrics import MetricFunction, sequence_length, vocabulary_rarity
from penstock.data_pipeline.data_sampling.ragged import shard_bounds
from penstock.data_pipeline.data_sampling.repetition import compression_ratio, repeated_ngrams, unique_ratio
from penstock.data_pipeline.data_sampling.unfinished import DIRECTORY, STATE, Unfinished

VOCABULARY_RARITY: Final = "vocabularyrarity"
_FUNCTIONS: Final[dict[str, MetricFunction]] = {
    "seqlen": sequence_length,
    "compressionratio": compression_ratio,
    "uniqueratio": unique_ratio,
    "repeatedngrams": repeated_ngrams(),
}
KNOWN_METRICS: Final = ("seqlen", VOCABULARY_RARITY, "compressionratio", "uniqueratio", "repeatedngrams")
DEFAULT_METRICS: Final = ("seqlen", VOCABULARY_RARITY)

_SHARD_TOKENS: Final = 1 << 22
_BATCH_TOKENS: Final = 1 << 18  # what a pass of numpy leaves in the cache for the next

Progress = Callable[[str, int, int], object]


class DataAnalyzer:
    """Computes difficulty metrics of all samples and stores them for a curriculum.

    The samples are cut into shards that Daft spreads over this machine's cores, or over a Ray cluster. The dataset is
    read once, or twice if a metric needs token counts of the whole corpus first. Memory is bounded by ``batch_tokens``
    for each core; values lie in memory-mapped files, and are sorted out of core. What is there when the process ends
    is kept in ``output_dir/unfinished``, from where ``run(resume=True)`` goes on.

    Args:
        dataset: Any map-style dataset whose samples are sequences of tokens. :class:`IndexedDataset` and
            :class:`TokenWindows` are read without a call per sample; any other by one thread at a time, through
            ``__getitems__`` where it has that.
        metrics: Names: ``seqlen`` (tokens of a sample), ``vocabularyrarity`` (mean of ``-log p(token)`` in nats, with
            ``p`` the token's frequency in the dataset), ``compressionratio`` (:func:`compression_ratio`),
            ``uniqueratio`` (:func:`unique_ratio`), ``repeatedngrams`` (:func:`repeated_ngrams` of three tokens).
        output_dir: Where :meth:`run` stores the analysis.
        metric_functions: More metrics by name: functions from ``(tokens, offsets)`` of many samples to an array of one
            number per sample, where sample ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``. They are called from several
            threads, or in other processes on Ray.
        total_functions: Figures of the whole dataset by name: functions from ``(tokens, offsets)`` of many samples to
            an array of the same shape each time. The sum over all samples is stored (:meth:`Analysis.total`); floats
            are added up in the order of the samples, whatever the engine. Until the end, a row for each shard lies on
            disk.
        tokens_of: From sample to tokens, where samples are not plain sequences of tokens. By default a dictionary's
            ``input_ids``, or the first of a tuple of arrays.
        vocabulary_size: Token numbers from here on are refused.
        batch_tokens: Tokens that a function is given at once.
        shard_tokens: Tokens of a shard, which is what is lost at most of each core's work when the process ends.
        engine: ``native`` or ``ray``.
        progress: Called as ``progress(what, samples_done, samples)`` after every shard.

    Raises:
        ValueError: A metric is unknown or named twice, or an argument is out of range.
    """

    def __init__(
        self,
        dataset: Any,
        metrics: Sequence[str] = DEFAULT_METRICS,
        output_dir: str | os.PathLike[str] = "analysis",
        *,
        metric_functions: Mapping[str, MetricFunction] | None = None,
        total_functions: Mapping[str, MetricFunction] | None = None,
        tokens_of: Callable[[Any], Any] | None = None,
        vocabulary_size: int | None = None,
        batch_tokens: int = _BATCH_TOKENS,
        shard_tokens: int = _SHARD_TOKENS,
        engine: Engine = "native",
        progress: Progress | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"an analysis needs to know how many samples there are, but {type(dataset).__name__} has no length; "
                "give a map-style dataset, or write the samples to .bin/.idx first"
            )
        self.dataset = dataset
        self.output_dir = Path(output_dir)
        self._user_metrics = dict(metric_functions or {})
        self._totals = dict(total_functions or {})
        self.metrics = (*metrics, *self._user_metrics)
        for name in metrics:
            if name not in KNOWN_METRICS:
                raise ValueError(f"{unknown_name('metric', name, KNOWN_METRICS)}; others go into metric_functions")
        names = [*self.metrics, *self._totals]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"name each metric once, and at least one; got {names}")
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"a metric's name becomes a file's: letters, digits, - and _ only; got {name!r}")
        for option, number in (
            ("batch_tokens", batch_tokens),
            ("shard_tokens", shard_tokens),
            ("vocabulary_size", vocabulary_size),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{option} must be at least 1, got {number}")
        check_engine(engine)
        self._tokens_of = tokens_of
        self._vocabulary_size = vocabulary_size
        self._batch_tokens = batch_tokens
        self._shard_tokens = shard_tokens
        self._engine: Engine = engine
        self._progress = progress

    def run(self, *, resume: bool = False, overwrite: bool = False) -> Analysis:
        """Read the dataset, compute the metrics and store them in ``output_dir``.

        Args:
            resume: Go on from what an earlier run of the same dataset and metrics left there. Functions of yours are
                told by where they are defined, or by an attribute ``identity`` if they have one, which should change
                when their results do.
            overwrite: Replace an analysis that is there, and what one that was cut off has measured.

        Returns:
            The stored analysis; :meth:`load` opens it again.

        Raises:
            TimeoutError: Another process is writing an analysis there.
            ValueError: An analysis, or what was measured for another one, is there and is not to be overwritten; a
                sample's tokens are not integers or beyond the vocabulary, or a metric function returns
                something other than one finite number per sample, or a total something other than finite numbers.
        """
        with analyzing(self.output_dir):
            return self._run(resume, overwrite)

    def _run(self, resume: bool, overwrite: bool) -> Analysis:
        begun = any((self.output_dir / DIRECTORY / name).is_file() for name in (STATE, MANIFEST_NAME))
        if (self.output_dir / MANIFEST_NAME).is_file() and not overwrite and not (resume and begun):
            raise ValueError(
                f"{self.output_dir}: there is a finished analysis already; say overwrite (--overwrite) to replace "
                "it, or write elsewhere"
            )
        mark = fingerprint(self.dataset, self._tokens_of)
        rare = VOCABULARY_RARITY in self.metrics
        functions = {
            name: self._user_metrics[name] if name in self._user_metrics else _FUNCTIONS[name]
            for name in self.metrics
            if name != VOCABULARY_RARITY
        }
        first = Measurement(
            self.dataset,
            functions,
            self._tokens_of,
            self._batch_tokens,
            self._totals,
            count=rare,
            vocabulary_size=self._vocabulary_size,
        )
        forms = first.probe()
        rarity = {VOCABULARY_RARITY: Form(np.dtype(np.float64))} if rare else {}
        forms |= rarity
        dtypes = {name: forms[name].dtype for name in self.metrics}
        totals = {name: forms[name] for name in self._totals}
        bounds = shard_bounds(self.dataset, self._shard_tokens)
        key = _digest(
            mark,
            self.metrics,
            [_identity(function) for function in (*self._user_metrics.values(), *self._totals.values())],
            [(name, form.dtype.str, form.shape) for name, form in forms.items()],
            bounds,
        )
        if resume and sealed_key(self.output_dir) == key:
            return put_in_place(self.output_dir)
        store = Unfinished(
            self.output_dir, key, bounds, dtypes, 1 + rare, totals=totals, resume=resume, overwrite=overwrite
        )
        try:
            self._pass(0, "reading" if functions or totals else "counting tokens", first, store)
            if rare:
                second = Measurement(
                    self.dataset,
                    {VOCABULARY_RARITY: vocabulary_rarity(store.counts)},
                    self._tokens_of,
                    self._batch_tokens,
                    forms=rarity,
                )
                self._pass(1, VOCABULARY_RARITY, second, store)
            store.save()  # the sorting, which comes now, may take long
        except BaseException:  # Ctrl-C too: what was measured is kept, and the error goes on
            store.leave()
            raise
        return seal_analysis(
            self.output_dir,
            store,
            self.metrics,
            len(self.dataset),
            fingerprint=mark,
            own_tokens=self._tokens_of is not None,
            counts=store.counts if rare else None,
        )

    def count_tokens(self) -> npt.NDArray[np.int64]:
        """How often each token number occurs in the dataset: int64, one pass."""
        counts = np.zeros(self._vocabulary_size or 0, dtype=np.int64)
        work = Measurement(
            self.dataset, {}, self._tokens_of, self._batch_tokens, count=True, vocabulary_size=self._vocabulary_size
        )
        bounds = shard_bounds(self.dataset, self._shard_tokens)
        for _, (_, found) in map_ranges(work, bounds, range(len(bounds) - 1), self._engine):
            counts = _sum(counts, found)
        return counts

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Analysis:
        """Open a stored analysis; see :meth:`Analysis.load`."""
        return Analysis.load(path)

    def _pass(self, number: int, what: str, work: "Measurement", store: Unfinished) -> None:
        samples, done = len(self.dataset), store.done_samples(number)
        bounds = store.bounds
        names = (*work.totals, *work.functions)
        for shard, (tokens, counts, *found) in map_ranges(work, bounds, store.missing(number), self._engine):
            if number == 0:
                store.tokens = (store.tokens or 0) + int(tokens[0])
                store.counts = _sum(store.counts, counts)
            store.store(number, shard, dict(zip(names, found, strict=True)))
            done += bounds[shard + 1] - bounds[shard]
            if self._progress is not None:
                self._progress(what, done, samples)


def _sum(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Counts that may know different numbers of tokens, added; the longer is added to in place."""
    short, long = sorted((a, b), key=len)
    long[: len(short)] += short
    return long


def _identity(function: Any) -> str:
    """What tells a function from another one of the same name."""
    own = getattr(function, "identity", None)
    if own is not None:
        return str(own)
    place = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(place, '__module__', '')}:{place.__qualname__}"


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
