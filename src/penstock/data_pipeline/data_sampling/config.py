"""The ``sampling_config`` of a :class:`DataSampler`, checked before any data is touched."""

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from penstock.data_pipeline.data_sampling.curriculum import Number, ScheduleConfig, ScheduleDetails, ScheduleType
from penstock.data_pipeline.data_sampling.mixture import MixtureConfig
from penstock.data_pipeline.data_sampling.pacing import PacingConfig
from penstock.data_pipeline.data_sampling.skips import SkipRanges
from penstock.data_pipeline.data_sampling.subset import SubsetConfig


class MetricConfig(BaseModel):
    """One difficulty metric and its schedule.

    Attributes:
        values: The metric of each sample; or
        path: where it is stored: an analyzer's output directory, or a ``.npy`` file. Without both, the metric is the
            length of each sample, of a dataset that has ``lengths``.
        difficulty_type: ``value``: difficulties are values of the metric. ``percentile``: they are percentages, above 0
            and up to 100, of the samples sorted by it.
        min_difficulty, max_difficulty, schedule_type, schedule_config: See :class:`ScheduleConfig`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    values: Any = None
    path: str | None = None
    difficulty_type: Literal["value", "percentile"] = "value"
    min_difficulty: Number | None = None
    max_difficulty: Number | None = None
    schedule_type: ScheduleType
    schedule_config: ScheduleDetails = Field(default_factory=ScheduleDetails)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.values is not None and self.path is not None:
            raise ValueError("give the metric's numbers either as values or as the path where they are stored")
        self.schedule()
        return self

    def schedule(self) -> ScheduleConfig:
        """The schedule alone."""
        return ScheduleConfig(
            min_difficulty=self.min_difficulty,
            max_difficulty=self.max_difficulty,
            schedule_type=self.schedule_type,
            schedule_config=self.schedule_config,
        )


class CurriculumConfig(BaseModel):
    """The metrics that decide when a sample enters; it enters when all of them admit it.

    Attributes:
        metrics: By name, at least one.
        until_step: The curriculum is a warm-up of so many steps; the plain random order of all samples follows. None
            keeps the curriculum for the whole run.
        pacing: Let samples enter when the validation loss stops improving, instead of at the schedules' steps, which
            then only say in which order and portions they do. See :class:`PacingConfig`.
        cache: Directory in which the sorted samples are kept for later starts, under a digest of metrics and schedules;
            None sorts them in memory at every start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: dict[str, MetricConfig] = Field(min_length=1)
    until_step: int | None = Field(default=None, ge=1)
    pacing: PacingConfig | None = None
    cache: str | None = None


class SamplingConfig(BaseModel):
    """What a :class:`DataSampler` does.

    Attributes:
        strategy: ``sequential``, ``random`` (each epoch permuted anew), ``stratified`` (needs ``labels``), ``weighted``
            (needs ``weights``), ``importance`` (needs ``scores``) or ``curriculum`` (needs ``curriculum``).
        seed: The key of all random choices.
        batch_size: Samples of a global batch, over all replicas. A curriculum's steps are global batches.
        num_samples: Length of the run in samples; or
        epochs: its length in epochs (1 if neither is given).
        drop_last: Leave out a last batch that is not full.
        num_replicas: How many data-parallel replicas share each global batch.
        rank: Which of them this one is.
        labels: ``stratified``: the stratum of each sample (numbers or strings), or a function from sample to label.
        weights: ``weighted``: the weight of each sample, a function from sample to weight, or the path of a ``.npy``.
        scores: ``importance``: the score of each sample, any number, given like ``weights``; a sample weighs
            ``exp(score / temperature)``.
        temperature: ``importance``: how much scores differ by before it matters; large values make all samples alike.
        replacement: ``weighted`` and ``importance``: draw each position independently, so that samples repeat.
        samples_per_epoch: ``weighted`` and ``importance``: draws that make an epoch; all samples of positive weight if
            None.
        curriculum: ``curriculum``: the metrics.
        mixture: Weights over corpora, of a dictionary of them as the data; ``random`` and ``sequential`` then are the
            order inside each. See :class:`MixtureConfig`.
        subset: A part of the samples, which is all that the strategy sees; see :class:`SubsetConfig`.
        skip_ranges: Pairs ``[first, end)`` of places in the order that the run leaves out, after a loss spike for
            example. A run that is resumed may add ranges that it has not reached.
        transforms: What :meth:`DataSampler.preprocess_data` does, in order: names (``"normalise"``), tables with the
            options (``{"name": "truncate", "length": 128}``), or functions from sample to sample.
        column: Which column of a table holds the samples.
        length: Cut a stream of tokens (``.bin/.idx``) into windows of ``length + 1``.
        stride: Tokens between the starts of windows; ``length`` if None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["sequential", "random", "stratified", "weighted", "importance", "curriculum"] = "random"
    seed: int = 0
    batch_size: int = Field(default=1, ge=1)
    num_samples: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    drop_last: bool = False
    num_replicas: int = Field(default=1, ge=1)
    rank: int = Field(default=0, ge=0)
    labels: Any = None
    weights: Any = None
    scores: Any = None
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    replacement: bool = False
    samples_per_epoch: int | None = Field(default=None, ge=1)
    curriculum: CurriculumConfig | None = None
    mixture: MixtureConfig | None = None
    subset: SubsetConfig | None = None
    skip_ranges: list[tuple[int, int]] = Field(default_factory=list)
    transforms: list[str | dict[str, Any] | Callable[[Any], Any]] = Field(default_factory=list)
    column: str | None = None
    length: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_samples is not None and self.epochs is not None:
            raise ValueError("give the length of the run as num_samples or as epochs, not both")
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank {self.rank} of {self.num_replicas} replicas; ranks are 0..{self.num_replicas - 1}")
        if self.batch_size % self.num_replicas:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared equally by {self.num_replicas} replicas; "
                f"make it a multiple of {self.num_replicas}"
            )
        needs = {"labels": "stratified", "weights": "weighted", "scores": "importance", "curriculum": "curriculum"}
        for field, strategy in needs.items():
            given = getattr(self, field) is not None
            if given and self.strategy != strategy:
                raise ValueError(f"{field} is used by strategy '{strategy}', but the strategy is '{self.strategy}'")
            if not given and self.strategy == strategy:
                raise ValueError(f"strategy '{strategy}' needs {field}")
        drawn = self.replacement or self.samples_per_epoch is not None
        if self.strategy not in ("weighted", "importance") and drawn:
            raise ValueError(
                f"replacement and samples_per_epoch are used by strategies 'weighted' and 'importance', but the "
                f"strategy is '{self.strategy}'"
            )
        if self.temperature is not None and self.strategy != "importance":
            raise ValueError(f"temperature is used by strategy 'importance', but the strategy is '{self.strategy}'")
        if self.mixture is not None:
            if self.strategy not in ("random", "sequential"):
                raise ValueError(
                    f"a mixture reads each corpus in a random or sequential order, but the strategy is "
                    f"'{self.strategy}'; leave one of them out"
                )
            if self.subset is not None:
                raise ValueError("a mixture is of whole corpora; leave out subset, or cut the corpora before")
        SkipRanges(self.skip_ranges)
        return self
