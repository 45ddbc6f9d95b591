"""From a configuration and data to an order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.data_sampling.analysis import Analysis
from penstock.data_pipeline.data_sampling.births import DifficultyMetric, EntryPoints, entry_points
from penstock.data_pipeline.data_sampling.config import MetricConfig, SamplingConfig
from penstock.data_pipeline.data_sampling.curriculum import CurriculumScheduler
from penstock.data_pipeline.data_sampling.growing import GrowingOrder
from penstock.data_pipeline.data_sampling.order import IntArray, Order, SequentialOrder, ShuffledOrder, digest_of
from penstock.data_pipeline.data_sampling.stratified import StratifiedOrder
from penstock.data_pipeline.data_sampling.weighted import ReplacementOrder, WeightedOrder


@dataclass(frozen=True)
class Strategy:
    """An order, and what is known about it.

    Attributes:
        order: The order itself.
        excluded: Samples that never appear in it.
        schedulers: A curriculum's schedules by metric.
    """

    order: Order
    excluded: int = 0
    schedulers: dict[str, CurriculumScheduler] = field(default_factory=dict)


class CurriculumOrder:
    """A growing pool of samples in the order of their entry points.

    Args:
        entries: The samples sorted by when they enter.
        batch_size: Samples of a step: schedules count steps, orders count samples.
        seed: The key of all permutations.
    """

    def __init__(self, entries: EntryPoints, batch_size: int, seed: int) -> None:
        self._samples = entries.order
        self._growing = GrowingOrder(entries.sizes, [step * batch_size for step in entries.steps], seed)
        self.epoch_size = self._growing.epoch_size

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        return np.asarray(self._samples[self._growing(k)], dtype=np.int64)

    def digest(self) -> str:
        """See :class:`Order`."""
        return digest_of("curriculum", self._growing.digest(), self._samples)


def build_strategy(config: SamplingConfig, data: Any) -> Strategy:
    """The order that a configuration describes, over ``data``.

    Raises:
        ValueError: Labels, weights or metrics do not fit the data.
    """
    size = len(data)
    if config.strategy == "sequential":
        return Strategy(SequentialOrder(size))
    if config.strategy == "random":
        return Strategy(ShuffledOrder(size, config.seed))
    if config.strategy == "stratified":
        return Strategy(StratifiedOrder(_per_sample("labels", config.labels, data), config.seed))
    if config.strategy == "weighted":
        weights = _per_sample("weights", config.weights, data)
        kind = ReplacementOrder if config.replacement else WeightedOrder
        return Strategy(kind(weights, config.seed, config.samples_per_epoch), excluded=int((weights == 0).sum()))
    assert config.curriculum is not None
    metrics = [_metric(name, metric, size) for name, metric in config.curriculum.metrics.items()]
    entries = entry_points(metrics)
    return Strategy(
        CurriculumOrder(entries, config.batch_size, config.seed),
        excluded=entries.never,
        schedulers={metric.name: metric.scheduler for metric in metrics},
    )


def _per_sample(name: str, given: Any, data: Any) -> npt.NDArray[Any]:
    """One label or weight per sample, from an array or a function of the sample."""
    function: Callable[[Any], Any] | None = given if callable(given) else None
    values = np.asarray(given if function is None else [function(data[index]) for index in range(len(data))])
    if values.dtype == object and all(isinstance(value, str) for value in values.flat):  # as pandas holds text
        values = values.astype(str)
    if values.shape != (len(data),):
        raise ValueError(f"{name}: expected one for each of {len(data)} samples, got the shape {values.shape}")
    if values.dtype.kind not in "biufUS":
        raise ValueError(f"{name}: expected numbers or strings, got {values.dtype}")
    return values


def _metric(name: str, config: MetricConfig, size: int) -> DifficultyMetric:
    order = None
    if config.path is None:
        values = np.asarray(config.values)
    elif config.path.endswith(".npy"):
        values = _load_array(config.path)
    else:
        analysis = Analysis.load(config.path)
        values, order = analysis.values(name), analysis.order(name)
    if values.shape != (size,):
        raise ValueError(f"metric {name!r}: expected a value for each of {size} samples, got the shape {values.shape}")
    return DifficultyMetric(name, values, CurriculumScheduler(config.schedule()), config.difficulty_type, order)


def _load_array(path: str) -> npt.NDArray[Any]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file of metric values")
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable array ({error})") from None
    return found
