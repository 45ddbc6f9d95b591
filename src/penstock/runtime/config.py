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
from penstock.data_pipeline.data_sampling.mixture import MixtureConfig
from penstock.runtime.batch_sizes import BatchSizes
from penstock.runtime.batching_section import BatchingSection
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
        if self.fp16 != FP16Section() and self.precision != "fp16":
            raise ValueError(
                f"fp16 sets loss scaling, which precision={self.precision} does not use; "
                "set precision: fp16, or remove the section"
            )
        if self.pipe.record_timeline and self.output is None:
            raise ValueError(
                f"pipe.record_timeline={self.pipe.record_timeline} writes timelines to the run's directory, which is "
                "not known; set output, or record_timeline: 0"
            )
        self._check_batches()
        self._check_batching()
        self._check_mixture()
        self._check_lengths()
        self._check_exchange()
        self.check_tensor_parallel()
        self._check_local_updates()
        self._check_dropping()
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

    def _check_batches(self) -> None:
        if self.data_parallel.replicas is not None:
            self.micro_batches(self.data_parallel.replicas)

    def _check_batching(self) -> None:
        batching, train = self.batching, self.train
        micro_batches = train.global_batch_size // train.micro_batch_size
        for _, size in batching.sizes:
            if size % micro_batches:
                below, above = size // micro_batches * micro_batches, -(-size // micro_batches) * micro_batches
                raise ValueError(
                    f"batching.sizes: {size} samples cannot be divided into a step's {micro_batches} micro-batches "
                    f"(global_batch_size / micro_batch_size), whose rows grow; take {below or above} or {above}"
                )
        if batching.sizes and self.sequence_length is None:
            raise ValueError("batching.sizes are keyed by tokens; set data.sequence_length")
        if self.data.cut in ("documents", "powers") and batching.token_budget is None:
            raise ValueError(
                f"data.cut={self.data.cut} gives samples of different lengths; set batching.token_budget to batch them"
            )
        if self.data.cut == "packed" and (batching.token_budget or batching.sequence_length):
            raise ValueError(
                "data.cut=packed gives rows of one length whose documents know their places; leave out "
                "batching.token_budget and batching.sequence_length, or take another data.cut"
            )
        varied = bool(batching.sizes) or batching.sequence_length is not None
        if varied and self.schedule.by == "layer_tokens" and self.schedule.total_tokens is None:
            raise ValueError(
                "schedule.by=layer_tokens does not know how many a run computes whose steps differ (batching.sizes, "
                "batching.sequence_length); set schedule.total_tokens, or schedule.by: tokens"
            )
        if batching.token_budget is not None:
            if self.train.loss_weighting != "tokens":
                raise ValueError(
                    f"train.loss_weighting={self.train.loss_weighting} counts micro-batches alike, but those of "
                    "batching.token_budget differ in rows and may repeat some; set train.loss_weighting: tokens"
                )
            if self.random_ltd_enabled:
                raise ValueError(
                    "random_ltd keeps a number of tokens of sequences of one length, and batching.token_budget makes "
                    "batches of different lengths; keep one of them"
                )
            if (self.sampling.get("curriculum") or {}).get("pacing") is not None:
                raise ValueError(
                    "batching.token_budget sorts samples ahead of the step at which a paced curriculum decides about "
                    "them; keep one of batching.token_budget and sampling.curriculum.pacing"
                )

    def _check_mixture(self) -> None:
        mixture = self.sampling.get("mixture")
        if isinstance(self.data.train, dict) and mixture is None:
            raise ValueError("data.train names several corpora; give their weights in sampling.mixture.corpora")
        if mixture is None:
            return
        if isinstance(self.data.train, str):
            raise ValueError("sampling.mixture needs data.train to be a table of paths by the corpora's names")
        if self.batching.token_budget is not None:
            raise ValueError(
                "sampling.mixture counts samples, and batching.token_budget sorts them by length first, so no step "
                "would have the shares that were asked for; keep one of them"
            )
        settings = validate_config(MixtureConfig, mixture, "sampling.mixture")
        if settings.by == "steps" and settings.places != [0] and self.batching.sizes:
            raise ValueError(
                "sampling.mixture changes weights by steps, but batching.sizes changes how many samples a step has; "
                "set sampling.mixture.by: tokens or samples"
            )

    def _check_lengths(self) -> None:
        length = self.sequence_length
        context = None if self.model is None else self.model.context
        if context is not None and length is not None and length > context:
            raise ValueError(
                f"data.sequence_length={length} is longer than model.context={context}; "
                f"lower the former or raise the latter to {length}"
            )
        if self.train.total_tokens is not None:
            if self.tokens_per_step is None:
                raise ValueError(
                    "train.total_tokens needs a sequence length to be turned into steps; "
                    "set data.sequence_length or model.context, or give train.steps"
                )
            if self.train.total_tokens < self.tokens_per_step:
                raise ValueError(
                    f"train.total_tokens={self.train.total_tokens} is less than one step reads: "
                    f"{self.train.global_batch_size} samples of {length} tokens = {self.tokens_per_step}"
                )

    def _check_exchange(self) -> None:
        optimizer, compression = self.optimizer, self.compression
        if self.data_parallel.sharded:
            if optimizer.owns_exchange:
                raise ValueError(
                    f"optimizer.name={optimizer.name} exchanges whole momenta, but data_parallel.sharding="
                    f"{self.data_parallel.sharding} leaves each replica a part; set sharding: none or name: adamw"
                )
            if self.local_updates is not None:
                raise ValueError(
                    "local_updates lets replicas train apart, each with whole weights, but data_parallel.sharding="
                    f"{self.data_parallel.sharding} leaves each a part; remove one of the two"
                )
            if compression.algorithm != "none":
                raise ValueError(
                    f"compression.algorithm={compression.algorithm} compresses whole gradients, but data_parallel."
                    f"sharding={self.data_parallel.sharding} divides them; set one of the two to none"
                )
        if optimizer.owns_exchange and compression.algorithm != "none":
            raise ValueError(
                f"compression.algorithm={compression.algorithm} and optimizer.name={optimizer.name} would both "
                f"exchange gradients; keep one: compression.algorithm: none with {optimizer.name}, "
                "or optimizer.name: adamw"
            )
        if optimizer.post_validation:
            reasons = {
                "precision: fp16 must know whether gradients overflowed to scale the next step's loss": (
                    self.precision == "fp16",
                    "take precision: bf16",
                ),
                "local_updates leave no norm over the replicas to wait for": (
                    self.local_updates is not None,
                    "remove local_updates",
                ),
                f"data_parallel.sharding: {self.data_parallel.sharding} gathers weights in forward passes": (
                    self.data_parallel.sharded,
                    "set sharding: none",
                ),
            }
            for reason, (holds, remedy) in reasons.items():
                if holds:
                    raise ValueError(
                        f"optimizer.post_validation does not go with this run: {reason}; {remedy}, or post_validation: "
                        "false"
                    )
        for name, value in (
            ("optimizer.freeze_step", optimizer.freeze_step),
            ("compression.warmup_steps", compression.warmup_steps),
        ):
            if value is not None and value > self.total_steps:
                raise ValueError(
                    f"{name}={value} is more than the run's {self.total_steps} steps, so nothing would be compressed; "
                    f"lower it (for example to {max(1, self.total_steps // 5)}) or train longer"
                )

    def check_tensor_parallel(self) -> None:
        """Refuse what cannot be done with parts of layers.

        Raises:
            ValueError: ``tensor_parallel.size`` does not go with another section.
        """
        size, optimizer = self.tensor_parallel.size, self.optimizer
        if self.compile.enabled and (size > 1 or self.data_parallel.sharded):
            raise ValueError(
                "compile.enabled takes layers that communicate nothing inside, but those of tensor_parallel and of "
                "data_parallel.sharding do; set compile.enabled: false, or tensor_parallel.size: 1 and sharding: none"
            )
        if size == 1:
            return
        if self.data_parallel.sharded:
            raise ValueError(
                f"tensor_parallel.size={size} and data_parallel.sharding={self.data_parallel.sharding} would both "
                "divide the layers; set one of them, tensor_parallel.size: 1 or sharding: none"
            )
        if self.local_updates is not None:
            raise ValueError(
                f"tensor_parallel.size={size} divides layers, but local_updates exchanges whole ones; set "
                "tensor_parallel.size: 1, or remove local_updates"
            )
        if optimizer.post_validation:
            raise ValueError(
                f"optimizer.post_validation adds up norms along pipelines, and tensor_parallel.size={size} divides "
                "them over more ranks; set post_validation: false, or tensor_parallel.size: 1"
            )
        if self.pipe.partition_method == "profile":
            raise ValueError(
                "pipe.partition_method=profile measures whole layers, which no rank computes with "
                f"tensor_parallel.size={size}; take parameters, uniform or explicit bounds"
            )
        if optimizer.name != "adamw":
            raise ValueError(
                f"optimizer.name={optimizer.name} looks at whole matrices or compresses them, of which each rank has a "
                f"part with tensor_parallel.size={size}; take name: adamw, or tensor_parallel.size: 1"
            )

    def _check_local_updates(self) -> None:
        section = self.local_updates
        if section is None:
            return
        if self.optimizer.owns_exchange:
            raise ValueError(
                f"local_updates and optimizer.name={self.optimizer.name} would both exchange; keep one: "
                "optimizer.name: adamw with local_updates, or no local_updates"
            )
        if self.compression.algorithm != "none":
            raise ValueError(
                f"compression.algorithm={self.compression.algorithm} is about gradients, of which none are exchanged "
                f"with local_updates; name it there: local_updates.algorithm: {self.compression.algorithm}"
            )
        steps, period, fragments = self.total_steps, section.period, section.number_of_fragments
        if period > steps:
            raise ValueError(
                f"local_updates.period={period} is more than the run's {steps} steps, so nothing would be exchanged; "
                "lower it or train longer"
            )
        if fragments > period:
            raise ValueError(
                f"local_updates.fragments={fragments} take turns within period={period} steps, one after a step at "
                f"most; take fewer fragments or a period of at least {fragments}"
            )
        if section.overlap is not None and section.overlap >= period:
            raise ValueError(
                f"local_updates.overlap={section.overlap} must be less than period={period}: a fragment is received "
                "before it is sent again"
            )
        if fragments == 1 and not section.overlap and steps % period:
            below, above = steps // period * period, -(-steps // period) * period
            raise ValueError(
                f"the run's {steps} steps are not a multiple of local_updates.period={period}: what the replicas learn "
                f"in the last {steps - below} would be lost; train {below} or {above} steps"
            )

    def _check_dropping(self) -> None:
        section, length = self.random_ltd, self.sequence_length
        by_layer_tokens = self.schedule.by == "layer_tokens"
        if section is None or not section.enabled:
            if by_layer_tokens:
                raise ValueError(
                    "schedule.by: layer_tokens counts what layers compute while tokens are dropped, but this run has "
                    "no random_ltd; set schedule.by: tokens, which is the same curve without dropping"
                )
            return
        if self.lr_by_deepspeeds_section and "schedule" in self.model_fields_set:
            raise ValueError(
                "random_ltd.layer_token_lr_schedule and schedule both set the learning rate; keep one of them "
                "(schedule.by: layer_tokens is the same in the run's own words)"
            )
        for name, value in (("min_tokens", section.min_tokens), ("max_tokens", section.max_tokens)):
            if value is not None and length is not None and value > length:
                raise ValueError(
                    f"random_ltd.{name}={value} is more than the sequence length {length} "
                    "(data.sequence_length or model.context); lower it"
                )
        if self.model is not None:
            section.layer_ids(self.model.num_layers)


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
