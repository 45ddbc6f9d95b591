"""A run's configuration: YAML or JSON, with overrides, checked as a whole before anything is built.

Example::

    model: {name: gpt, num_layers: 4, hidden_size: 192, num_heads: 6, context: 256}
    pipe: {stages: 2, schedule: 1f1b}
    data_parallel: {replicas: 2}
    train: {global_batch_size: 32, micro_batch_size: 4, steps: 500}
    optimizer: {name: onebit_adam, lr: 1.0e-3, freeze_step: 100}
    data: {train: corpus/train, heldout: corpus/heldout}
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from pydantic import Field, field_validator, model_validator

from penstock._core.counted import counted
from penstock.data_pipeline.configuration import apply_overrides, read_mapping, validate_config
from penstock.data_pipeline.data_sampling.config import SamplingConfig
from penstock.runtime.batch_sizes import BatchSizes
from penstock.runtime.batching_section import BatchingSection
from penstock.runtime.config_checks import check_sections
from penstock.runtime.config_sections import (
    CompileSection,
    CompressionSection,
    DataParallelSection,
    DataSection,
    FP16Section,
    ModelSection,
    PipeSection,
    ScheduleSection,
    Section,
    TensorParallelSection,
    TrainSection,
    check_precision,
)
from penstock.runtime.local_updates_section import LocalUpdatesSection
from penstock.runtime.optimizer_section import OptimizerSection
from penstock.runtime.random_ltd_section import RandomLTDSection

_SAMPLER_KEYS_OF_THE_RUN: Final = {
    "batch_size": "train.global_batch_size",
    "rank": "the process's place in the run",
    "num_replicas": "data_parallel.replicas",
    "num_samples": "train.steps or train.total_tokens",
    "epochs": "train.steps or train.total_tokens",
    "drop_last": "train.global_batch_size, which every step fills",
    "length": "data.sequence_length",
}
_SAMPLER_KEYS_OF_THE_DATA: Final = {
    "column": "open_dataset(path, column=...)",
    "stride": "TokenWindows(IndexedDataset(path), length, stride)",
    "transforms": "process_dataset(data, transform)",
}
"""What a run does not do to its samples, and what to give as ``training_data`` instead."""


class TrainConfig(Section):
    """Everything a run is made of; see the sections for their keys.

    Attributes:
        seed: Decides every random choice of the run.
        output: Directory of the run: checkpoints, ``metrics.jsonl``, summary. None writes nothing.
        deadline_s: How long any wait for another process may last, in seconds.
        precision: ``float32``, ``float64``, ``bf16`` or ``fp16``. The latter two keep weights, gradients and the
            optimizer in float32 and compute matrix products in 16 bits, by torch's autocast.
        fp16: Loss scaling, with ``precision: fp16``.
        model: The reference model; None when a model object is given.
        pipe: Stages and schedule.
        data_parallel: Replicas.
        tensor_parallel: Ranks that divide each layer among them.
        compile: Layers compiled by ``torch.compile``.
        train: Batch sizes and length.
        batching: Steps that differ in samples and tokens.
        data: Paths and sequence length.
        sampling: Handed to :class:`penstock.data_pipeline.data_sampling.DataSampler`: strategy, seed, curriculum.
        random_ltd: Token dropping; None drops nothing.
        compression: Gradients on the wire.
        local_updates: Replicas that train apart and meet now and then; None exchanges at every step.
        optimizer: The optimizer.
        schedule: The learning rate.
    """

    seed: int = 1234
    output: str | None = None
    deadline_s: float = Field(default=300.0, gt=0)
    precision: str = "float32"
    fp16: FP16Section = Field(default_factory=FP16Section)
    model: ModelSection | None = None
    pipe: PipeSection = Field(default_factory=PipeSection)
    data_parallel: DataParallelSection = Field(default_factory=DataParallelSection)
    tensor_parallel: TensorParallelSection = Field(default_factory=TensorParallelSection)
    compile: CompileSection = Field(default_factory=CompileSection)
    train: TrainSection
    batching: BatchingSection = Field(default_factory=BatchingSection)
    data: DataSection = Field(default_factory=DataSection)
    sampling: dict[str, Any] = Field(default_factory=dict)
    random_ltd: RandomLTDSection | None = None
    compression: CompressionSection = Field(default_factory=CompressionSection)
    local_updates: LocalUpdatesSection | None = None
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)

    _precision = field_validator("precision")(check_precision)

    @field_validator("sampling")
    @classmethod
    def _check_sampling(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, owner in _SAMPLER_KEYS_OF_THE_RUN.items():
            if key in value:
                raise ValueError(f"{key} is set by the run from {owner}; remove it here")
        for key, instead in _SAMPLER_KEYS_OF_THE_DATA.items():
            if key in value:
                raise ValueError(
                    f"a run takes its samples as they come; instead of {key}, give training_data={instead}"
                )
        validate_config(SamplingConfig, value, "DataSampler")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        check_sections(self)
        return self

    @property
    def sequence_length(self) -> int | None:
        """Tokens per training sample, or None when neither the data nor the model section says."""
        if self.data.sequence_length is not None:
            return self.data.sequence_length
        return None if self.model is None else self.model.context

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one global batch of full sequences, or None when the sequence length is unknown."""
        if self.batching.token_budget is not None:
            return self.batching.token_budget.max_tokens * (self.train.global_batch_size // self.train.micro_batch_size)
        length = self.sequence_length
        return None if length is None else length * self.train.global_batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.total_tokens is not None  # exactly one is given
        assert self.tokens_per_step is not None  # checked at loading
        if self.batching.sizes:
            return self.batch_sizes.steps_within(self.train.total_tokens)
        return self.train.total_tokens // self.tokens_per_step

    @property
    def batch_sizes(self) -> BatchSizes:
        """Samples of a step by the tokens consumed."""
        return BatchSizes(self.train.global_batch_size, self.batching.sizes, self.sequence_length or 1)

    @property
    def samples_of_run(self) -> int | None:
        """Samples that the run's steps read, or None where a token budget decides."""
        if self.batching.token_budget is not None:
            return None
        if self.batching.sizes:
            return self.batch_sizes.tokens_after(self.total_steps) // (self.sequence_length or 1)
        return self.total_steps * self.train.global_batch_size

    @property
    def tokens_of_run(self) -> int | None:
        """Tokens that the run's steps read of full sequences, or None when the sequence length is unknown."""
        if self.train.total_tokens is not None:
            return self.train.total_tokens
        if self.batching.sizes:
            return self.batch_sizes.tokens_after(self.total_steps) if self.sequence_length else None
        return None if self.tokens_per_step is None else self.total_steps * self.tokens_per_step

    @property
    def random_ltd_enabled(self) -> bool:
        """Whether layers drop tokens in this run."""
        return self.random_ltd is not None and self.random_ltd.enabled

    @property
    def lr_by_deepspeeds_section(self) -> bool:
        """Whether ``random_ltd.layer_token_lr_schedule`` sets the learning rate."""
        section = self.random_ltd
        if section is None or not section.enabled or section.layer_token_lr_schedule is None:
            return False
        return section.layer_token_lr_schedule.enabled

    def micro_batches(self, replicas: int) -> int:
        """Micro-batches per step in each of ``replicas`` replicas.

        Raises:
            ValueError: The global batch cannot be divided so.
        """
        size, micro = self.train.global_batch_size, self.train.micro_batch_size
        if size % (micro * replicas):
            unit = micro * replicas
            below, above = size // unit * unit, -(-size // unit) * unit
            choices = f"{below} or {above}" if below else str(above)
            raise ValueError(
                f"train.global_batch_size={size} is not divisible by micro_batch_size * replicas = "
                f"{micro} * {replicas} = {unit}; take a global batch of {choices}"
            )
        return size // (micro * replicas)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a JSON value, which :func:`load_config` turns into an equal one.

        What only Python can give (arrays of labels, functions as transforms) appears by a description.
        """
        described: dict[str, Any] = _describe(self.model_dump())
        return described


def _describe(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _describe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(entry) for entry in value]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of {value.dtype}{list(value.shape)}"
    return getattr(value, "__qualname__", type(value).__qualname__)


def check_world(config: TrainConfig, world_size: int) -> int:
    """Check that the processes fit the layout, before any process group is made.

    Args:
        config: The run's configuration.
        world_size: Number of processes.

    Returns:
        The number of data-parallel replicas.

    Raises:
        ValueError: ``stages * replicas`` (times ``tensor_parallel.size``) is not ``world_size``, or the replicas cannot
            share the global batch evenly.
    """
    stages, size = config.pipe.stages, config.tensor_parallel.size
    replicas = config.data_parallel.replicas
    ranks, divided = stages * size, f" * tensor_parallel.size={size}" if size > 1 else ""
    if replicas is None:
        if world_size % ranks:
            raise ValueError(
                f"{counted(world_size, 'process', 'processes')} cannot form whole pipelines of pipe.stages={stages}"
                f"{divided}; start a multiple of {ranks} processes or change pipe.stages"
            )
        replicas = world_size // ranks
    elif ranks * replicas != world_size:
        raise ValueError(
            f"pipe.stages={stages} * data_parallel.replicas={replicas}{divided} = "
            f"{counted(ranks * replicas, 'process', 'processes')}, but {counted(world_size, 'was', 'were')} started; "
            f"start {ranks * replicas} or change one of the {'three' if divided else 'two'}"
        )
    if config.data_parallel.sharded and replicas == 1:
        raise ValueError(
            f"data_parallel.sharding={config.data_parallel.sharding} divides over replicas, but "
            f"{counted(world_size, 'process', 'processes')} with pipe.stages={stages} make only 1; start more "
            "processes, or set sharding: none"
        )
    per_machine = config.compression.replicas_per_machine
    if replicas % per_machine:
        raise ValueError(
            f"{counted(replicas, 'replica', 'replicas')} cannot fill machines of compression.replicas_per_machine="
            f"{per_machine}; make it a divisor of {replicas}, or change the number of processes"
        )
    config.micro_batches(replicas)
    return replicas


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig | None, overrides: Sequence[str] = ()
) -> TrainConfig:
    """Read, override and check a configuration.

    Args:
        source: A YAML or JSON file, a mapping, a configuration, or None to start from the overrides alone.
        overrides: ``"section.key=value"`` strings, applied in order; values are read as YAML.

    Raises:
        ValueError: The file cannot be read, a key is unknown (the nearest is named), or values are wrong or conflict.
    """
    if isinstance(source, TrainConfig):
        data, name = source.model_dump(exclude_unset=True), "configuration"
    elif source is None or isinstance(source, Mapping):
        data, name = dict(source or {}), "configuration"
    else:
        data, name = read_mapping(source), str(source)
    return validate_config(TrainConfig, apply_overrides(data, overrides), name)
