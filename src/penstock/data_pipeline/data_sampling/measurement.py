"""What an analysis does with a run of samples: count their tokens, call the metrics, check what these return."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.data_sampling.metrics import MetricFunction, count_tokens
from penstock.data_pipeline.data_sampling.ragged import RaggedBatch, ragged_batches

_PROBED: Final = 8


@dataclass(frozen=True, slots=True)
class Form:
    """Dtype, int64 or float64, and shape of what a function gives: of a metric for one sample, of a total at all."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()


@dataclass
class Measurement:
    """What is done to every shard; given its first and one past its last sample it returns arrays.

    They are the number of tokens (one int64), the count of each token number (int64, empty unless ``count``), then the
    sum of each total over the samples, and then for each metric the values of the samples.

    Attributes:
        dataset: The samples.
        functions: The metrics by name.
        tokens_of: From sample to tokens.
        batch_tokens: Tokens that a function is given at once.
        totals: Functions by name whose arrays are added up over the batches.
        count: Count the tokens.
        vocabulary_size: Token numbers from here on are refused when counting.
        forms: Of each metric and total: found by :meth:`probe`.
    """

    dataset: Any
    functions: dict[str, MetricFunction]
    tokens_of: Callable[[Any], Any] | None
    batch_tokens: int
    totals: dict[str, MetricFunction] = field(default_factory=dict)
    count: bool = False
    vocabulary_size: int | None = None
    forms: dict[str, Form] = field(default_factory=dict)

    def __call__(self, start: int, stop: int) -> list[npt.NDArray[Any]]:
        """Measure samples ``start`` to ``stop``."""
        counts = np.zeros((self.vocabulary_size or 0) if self.count else 0, dtype=np.int64)
        sums = [np.zeros(self.forms[name].shape, dtype=self.forms[name].dtype) for name in self.totals]
        values = [np.empty(stop - start, dtype=self.forms[name].dtype) for name in self.functions]
        tokens = 0
        for batch in ragged_batches(
            self.dataset, start, stop, batch_tokens=self.batch_tokens, tokens_of=self.tokens_of
        ):
            tokens += int(batch.offsets[-1])
            if self.count:
                counts = count_tokens(batch.tokens, counts, self.vocabulary_size)
            for (name, function), total in zip(self.totals.items(), sums, strict=True):
                part = _checked_total(name, function(batch.tokens, batch.offsets), batch)
                if part.shape != total.shape:
                    raise ValueError(
                        f"total {name!r} has shape {total.shape} for the first samples but {part.shape} for "
                        f"{batch.name}; only arrays of one shape can be added up"
                    )
                self._check_type("total", name, part, batch)
                total += part.astype(total.dtype, copy=False)
            for (name, function), column in zip(self.functions.items(), values, strict=True):
                found = _checked_values(name, function(batch.tokens, batch.offsets), batch)
                self._check_type("metric", name, found, batch)
                column[batch.start - start : batch.stop - start] = found
        return [np.array([tokens]), counts, *sums, *values]

    def probe(self) -> dict[str, Form]:
        """Try the functions on the first samples, to know their types and to fail early.

        Whole numbers are stored as int64 and others as float64: later samples may have larger ones than the first.

        Raises:
            ValueError: There are no samples, so the shape of a total is not known.
        """
        count = min(_PROBED, len(self.dataset))
        if not count and self.totals:
            raise ValueError(f"the dataset has no samples, so nothing can be added up: {', '.join(self.totals)}")
        self.forms = dict.fromkeys(self.functions, Form(np.dtype(np.float64)))
        for batch in ragged_batches(self.dataset, 0, count, batch_tokens=self.batch_tokens, tokens_of=self.tokens_of):
            for name, function in self.functions.items():
                found = _checked_values(name, function(batch.tokens, batch.offsets), batch)
                self.forms[name] = Form(_widest(found))
            for name, function in self.totals.items():
                found = _checked_total(name, function(batch.tokens, batch.offsets), batch)
                self.forms[name] = Form(_widest(found), found.shape)
            break
        return dict(self.forms)

    def _check_type(self, what: str, name: str, found: npt.NDArray[Any], batch: RaggedBatch) -> None:
        if found.dtype.kind == "f" and self.forms[name].dtype.kind == "i":
            raise ValueError(
                f"{what} {name!r} gives whole numbers for the first samples but {found.dtype} for {batch.name}; "
                "let it return one type, floats for example"
            )


def _widest(found: npt.NDArray[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if found.dtype.kind == "f" else np.int64)


def check_whole(what: str, found: npt.NDArray[Any]) -> None:
    """Refuse whole numbers that int64, as which all are stored, does not hold.

    Raises:
        ValueError: There is one.
    """
    most = np.iinfo(np.int64).max
    if found.dtype.kind == "u" and found.size and found.max() > most:
        raise ValueError(
            f"{what} has the whole number {found.max()}, but they are stored as int64, up to {most}; give fewer bits "
            "(number >> 1), or floats"
        )


def _checked_values(name: str, values: Any, batch: RaggedBatch) -> npt.NDArray[Any]:
    found = np.asarray(values)
    if found.shape != (len(batch),) or found.dtype.kind not in "biuf":
        raise ValueError(
            f"metric {name!r} must give one number for each of {len(batch)} samples, got {found.dtype} of shape "
            f"{found.shape}"
        )
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        bad = batch.start + int((~np.isfinite(found)).argmax())
        raise ValueError(f"metric {name!r} gives sample {bad} the value {found[bad - batch.start]}")
    check_whole(f"metric {name!r}", found)
    return found


def _checked_total(name: str, values: Any, batch: RaggedBatch) -> npt.NDArray[Any]:
    found = np.asarray(values)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"total {name!r} must give an array of numbers, got {found.dtype} of shape {found.shape}")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise ValueError(f"total {name!r} gives {batch.name} a number that is not finite")
    check_whole(f"total {name!r}", found)
    return found
