"""From a configuration and data to an order."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.data_sampling.analysis import Analysis
from penstock.data_pipeline.data_sampling.births import DifficultyMetric, schedule_identity
from penstock.data_pipeline.data_sampling.config import CurriculumConfig, MetricConfig, SamplingConfig
from penstock.data_pipeline.data_sampling.curriculum import CurriculumScheduler
from penstock.data_pipeline.data_sampling.curriculum_order import CurriculumOrder
from penstock.data_pipeline.data_sampling.entry_points import Progress, entry_points
from penstock.data_pipeline.data_sampling.mixture import MixtureOrder
from penstock.data_pipeline.data_sampling.order import (
    IntArray,
    Order,
    SequentialOrder,
    ShuffledOrder,
    WarmedUpOrder,
    digest_of,
)
from penstock.data_pipeline.data_sampling.pacing import Pacer
from penstock.data_pipeline.data_sampling.stratified import StratifiedOrder
from penstock.data_pipeline.data_sampling.subset import SubsetOrder, subset_members
from penstock.data_pipeline.data_sampling.weighted import ReplacementOrder, WeightedOrder, log_weights
from penstock.data_pipeline.datasets.corpora import Corpora


@dataclass(frozen=True)
class Strategy:
    """An order, and what is known about it.

    Attributes:
        order: The order itself.
        excluded: Samples that never appear in it.
        schedulers: A curriculum's schedules by metric.
        curriculum: The curriculum's own order, if there is one.
        until_step: The step at which the curriculum ends; None if it does not.
        mixture: A mixture's own order, if it is one.
    """

    order: Order
    excluded: int = 0
    schedulers: dict[str, CurriculumScheduler] = field(default_factory=dict)
    curriculum: CurriculumOrder | None = None
    until_step: int | None = None
    mixture: MixtureOrder | None = None


def build_strategy(config: SamplingConfig, data: Any, progress: Progress | None = None) -> Strategy:
    """The order that a configuration describes, over ``data``.

    Args:
        config: The configuration.
        data: The samples.
        progress: Told how far the sorting of a curriculum's samples is.

    Raises:
        ValueError: Labels, weights or metrics do not fit the data.
    """
    size = len(data)
    if isinstance(data, Corpora) != (config.mixture is not None):
        raise ValueError(
            "several corpora need the weights of a mixture; set sampling.mixture"
            if config.mixture is None
            else "a mixture needs its corpora by name; give a dictionary of datasets or paths (in a run as data.train)"
        )
    if config.mixture is not None:
        seed = config.seed if config.strategy == "random" else None
        mixture = MixtureOrder(config.mixture, data, config.batch_size, seed)
        return Strategy(mixture, mixture=mixture)
    if config.subset is None:
        return _over(config, data, size, None, progress)
    members = subset_members(config.subset, data, config.seed)
    inner = _over(config, data, len(members), members, progress)
    return Strategy(
        order=SubsetOrder(inner.order, members),
        excluded=inner.excluded + size - len(members),
        schedulers=inner.schedulers,
        curriculum=inner.curriculum,
        until_step=inner.until_step,
    )


def _over(
    config: SamplingConfig, data: Any, size: int, members: IntArray | None, progress: Progress | None
) -> Strategy:
    """The order over ``size`` samples: all, or the members of a subset."""
    if config.strategy == "sequential":
        return Strategy(SequentialOrder(size))
    if config.strategy == "random":
        return Strategy(ShuffledOrder(size, config.seed))
    if config.strategy == "stratified":
        return Strategy(StratifiedOrder(_per_sample("labels", config.labels, data, members), config.seed))
    if config.strategy in ("weighted", "importance"):
        return _weighted(config, data, members)
    assert config.curriculum is not None
    for metric in config.curriculum.metrics.values():
        if metric.path is not None and _is_analysis(metric.path):
            Analysis.load(metric.path, verify=False).check_dataset(data)
    return _curriculum(config.curriculum, config, data, size, members, progress)


def _weighted(config: SamplingConfig, data: Any, members: IntArray | None) -> Strategy:
    """Draws by the weights, or by the weights that scores make."""
    if config.strategy == "weighted":
        weights = _per_sample("weights", config.weights, data, members)
        logs = log_weights(weights)
    else:
        scores = _per_sample("scores", config.scores, data, members)
        logs = score_logs(scores, 1.0 if config.temperature is None else config.temperature)
        weights = np.exp(logs)
    if config.replacement:
        drawn = ReplacementOrder(weights, config.seed, config.samples_per_epoch)
        return Strategy(drawn, excluded=int((weights == 0).sum()))
    return Strategy(WeightedOrder(logs, config.seed, config.samples_per_epoch), excluded=int(np.isneginf(logs).sum()))


def score_logs(scores: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float64]:
    """The logarithms of the weights ``exp(score / temperature)``, less the largest of them.

    Raises:
        ValueError: A score is not a finite number.
    """
    if scores.dtype.kind not in "biuf":
        raise ValueError(f"scores: expected numbers, got {scores.dtype}")
    exact = scores.astype(np.float64)
    if not np.isfinite(exact).all():
        bad = int((~np.isfinite(exact)).argmax())
        raise ValueError(f"scores: sample {bad} has the score {exact[bad]}; scores are finite numbers")
    with np.errstate(over="ignore"):
        below = (exact - exact.max()) / temperature
    # Whatever the difference, a sample that has a score comes at some time.
    return np.asarray(np.maximum(below, np.finfo(np.float64).min), dtype=np.float64)


def _curriculum(
    curriculum: CurriculumConfig,
    config: SamplingConfig,
    data: Any,
    size: int,
    members: IntArray | None,
    progress: Progress | None,
) -> Strategy:
    metrics = [_metric(name, metric, data, members) for name, metric in curriculum.metrics.items()]
    identity = None
    if curriculum.cache is not None and members is None:
        identity = digest_of(
            *(
                part
                for metric in metrics
                for part in (
                    metric.name,
                    metric.difficulty_type,
                    schedule_identity(metric.scheduler),
                    _identity(curriculum.metrics[metric.name], metric),
                )
            )
        )
    folders = {metric.path for metric in curriculum.metrics.values() if metric.path and _is_analysis(metric.path)}

    def check() -> None:
        for folder in sorted(folders):
            Analysis.load(folder)

    entries = entry_points(metrics, curriculum.cache, identity=identity, check=check, progress=progress)
    pacer = None if curriculum.pacing is None else Pacer(curriculum.pacing, len(entries.sizes))
    order = CurriculumOrder(entries, config.batch_size, config.seed, pacer)
    schedulers = {metric.name: metric.scheduler for metric in metrics}
    if curriculum.until_step is None:
        return Strategy(order, excluded=entries.never, schedulers=schedulers, curriculum=order)
    return Strategy(
        WarmedUpOrder(order, ShuffledOrder(size, config.seed), curriculum.until_step * config.batch_size),
        schedulers=schedulers,
        curriculum=order,
        until_step=curriculum.until_step,
    )


def _per_sample(name: str, given: Any, data: Any, members: IntArray | None) -> npt.NDArray[Any]:
    """One label or weight per sample, from an array, a file or a function of the sample; of a subset, its members'."""
    if callable(given):
        numbers = range(len(data)) if members is None else members.tolist()
        values = np.asarray([given(data[index]) for index in numbers])
        expected = len(numbers)
    else:
        values = np.asarray(_load_array(given) if isinstance(given, str) else given)
        expected = len(data)
    if values.dtype == object and all(isinstance(value, str) for value in values.flat):  # as pandas holds text
        values = values.astype(str)
    if values.shape != (expected,):
        raise ValueError(f"{name}: expected one for each of {expected} samples, got the shape {values.shape}")
    if values.dtype.kind not in "biufUS":
        raise ValueError(f"{name}: expected numbers or strings, got {values.dtype}")
    return values if members is None or callable(given) else values[members]


def _metric(name: str, config: MetricConfig, data: Any, members: IntArray | None) -> DifficultyMetric:
    order, size = None, len(data)
    if config.path is None and config.values is None:
        lengths = getattr(data, "lengths", None)
        if lengths is None:
            raise ValueError(
                f"metric {name!r}: give its values, or the path where they are stored; without both it is the length "
                f"of each sample, which {type(data).__name__} does not know"
            )
        values = np.asarray(lengths)
    elif config.path is None:
        values = np.asarray(config.values)
    elif not _is_analysis(config.path):
        values = _load_array(config.path)
    else:
        # Its checksums cost a pass over all values: they are compared when these are read, not at every start.
        analysis = Analysis.load(config.path, verify=False)
        values, order = analysis.values(name), analysis.order(name)
    if values.shape != (size,):
        raise ValueError(f"metric {name!r}: expected a value for each of {size} samples, got the shape {values.shape}")
    if members is not None:
        values, order = values[members], None
    return DifficultyMetric(name, values, CurriculumScheduler(config.schedule()), config.difficulty_type, order)


def _identity(config: MetricConfig, metric: DifficultyMetric) -> str:
    """What tells one metric's data from another's without reading all of it, where it is stored."""
    if config.path is None:
        return digest_of(metric.values)
    path = Path(config.path)
    if not _is_analysis(config.path):
        facts = path.stat()
        return digest_of(str(path.resolve()), facts.st_size, facts.st_mtime_ns)
    return digest_of((path / "manifest.json").read_bytes())


def _is_analysis(path: str) -> bool:
    return not path.endswith(".npy")


def _load_array(path: str) -> npt.NDArray[Any]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file of numbers")
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable array ({error})") from None
    return found
