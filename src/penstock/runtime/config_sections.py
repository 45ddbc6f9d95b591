"""The sections of a run's configuration, each checked alone; :mod:`penstock.runtime.config` checks them together."""

from collections.abc import Callable
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from penstock._core.suggest import unknown_name
from penstock.compression.error_feedback import FeedbackRule
from penstock.compression.registry import create_compression_algorithm
from penstock.models.gpt_config import GPTConfig, PositionKind
from penstock.pipe.schedule import SCHEDULES, load_schedule
from penstock.runtime.activation_codec import ACTIVATION_COMPRESSIONS

DECAYS: Final = ("constant", "cosine", "linear")
MODELS: Final = ("gpt",)
PRECISIONS: Final = ("float32", "float64", "bf16", "fp16")
SHARDINGS: Final = ("none", "fsdp2")
COMPILE_MODES: Final = ("default", "max-autotune-no-cudagraphs")
LOSS_WEIGHTINGS: Final = ("tokens", "micro_batches")
_OTHER_NAMES: Final = {"fp32": "float32", "fp64": "float64", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


def one_of(kind: str, known: tuple[str, ...]) -> Callable[[str], str]:
    """A check that ``value`` is one of the known names."""

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(unknown_name(kind, value, known))
        return value

    return check


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The reference model to build, when no model object is given.

    The keys are ``name``, ``context`` (for ``context_length``) and the other attributes of
    :class:`penstock.models.gpt.GPTConfig`.

    Attributes:
        name: ``gpt``.
        vocab_size: Size of the vocabulary; None takes the tokenizer's.
        context: Longest sequence in tokens; None takes ``data.sequence_length``.
    """

    name: str = "gpt"
    vocab_size: int | None = Field(default=None, ge=1)
    num_layers: int = Field(default=4, ge=1)
    hidden_size: int = Field(default=192, ge=1)
    num_heads: int = Field(default=6, ge=1)
    context: int | None = Field(default=None, ge=1)
    mlp_ratio: float = 4.0
    positions: PositionKind = "rope"
    rope_theta: float = 10_000.0
    dropout: float = 0.0
    tie_embeddings: bool = True
    init_std: float = 0.02
    norm_eps: float = 1e-5
    vocabulary_parts: int = Field(default=1, ge=1)

    _known_name = field_validator("name")(one_of("model", MODELS))

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        self.gpt_config(vocab_size=self.vocabulary_parts, context=1)  # stand in for what is not known yet
        return self

    def gpt_config(self, *, vocab_size: int | None = None, context: int | None = None) -> GPTConfig:
        """The model's shape.

        Args:
            vocab_size: The tokenizer's, taken where the section gives none.
            context: The data's sequence length, taken where the section gives none.

        Raises:
            ValueError: One of the two is given nowhere, or the numbers do not fit together.
        """
        vocab_size = vocab_size if self.vocab_size is None else self.vocab_size
        context = context if self.context is None else self.context
        if vocab_size is None:
            raise ValueError("model.vocab_size is not known; set it, or give a tokenizer (data.tokenizer)")
        if context is None:
            raise ValueError("model.context is not known; set it or data.sequence_length")
        shape = self.model_dump(exclude={"name", "vocab_size", "context"})
        return GPTConfig(vocab_size=vocab_size, context_length=context, **shape)


class PipeSection(Section):
    """How the model is cut into stages.

    Attributes:
        stages: Number of pipeline ranks, each with one stage or, with ``chunks``, several; 1 is no pipeline.
        schedule: The name of a schedule that trains, or the path of a saved one (``.json``).
        chunks: Stages per pipeline rank; none takes the schedule's own number: 2 for interleaved, looped and V-shaped
            schedules, 1 for the others.
        slices: Pieces along the sequence into which ``seq1f1b`` cuts each micro-batch; none takes 2.
        partition_method: ``parameters``, ``uniform``, ``type:REGEX``, ``profile`` (layers are measured first), or
            explicit bounds (``stages * chunks + 1`` layer numbers).
        activation_checkpoint_interval: Layers recomputed together in the backward pass; 0 keeps all activations.
        activation_checkpoint_layers: Class names or numbers of the layers that are recomputed, each by itself, in place
            of an interval.
        activation_compression: How activations go to the next rank, and their gradients back, in training: ``none`` as
            they are, ``bf16``, ``fp8``, ``int8``, or ``int4`` (activations only; gradients are then ``int8``). All but
            ``none`` round what layers compute on.
        record_timeline: Steps, from the third of a process on, of which a timeline is written to ``output``.
    """

    stages: int = Field(default=1, ge=1)
    schedule: str = "1f1b"
    chunks: int | None = Field(default=None, ge=1)
    slices: int | None = Field(default=None, ge=1)
    partition_method: str | tuple[int, ...] = "parameters"
    activation_checkpoint_interval: int = Field(default=0, ge=0)
    activation_checkpoint_layers: tuple[str | int, ...] = ()
    activation_compression: str = "none"
    record_timeline: int = Field(default=0, ge=0)

    _known_compression = field_validator("activation_compression")(
        one_of("activation compression", ACTIVATION_COMPRESSIONS)
    )

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: str) -> str:
        if value.endswith(".json"):
            if load_schedule(value).forward_only:
                raise ValueError(f"{value}: a schedule without backward passes cannot train")
            return value
        if value == "forward_only":
            raise ValueError("schedule 'forward_only' has no backward passes and cannot train; take '1f1b' or another")
        able = tuple(name for name, known in SCHEDULES.items() if known.trains)
        return one_of("schedule", able)(value)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if isinstance(self.partition_method, str) or self.schedule not in SCHEDULES:
            return self  # a file says itself how many stages there are
        stages = self.stages * (self.chunks or SCHEDULES[self.schedule].chunks)
        if len(self.partition_method) != stages + 1:
            raise ValueError(
                f"partition_method lists {len(self.partition_method)} bounds, but {stages} stages have "
                f"{stages + 1}: the first layer of each stage, then the number of layers"
            )
        return self


class DataParallelSection(Section):
    """Replicas of the pipeline.

    Attributes:
        replicas: How many; None takes the number of processes divided by ``pipe.stages``.
        sharding: ``none`` keeps parameters, gradients and optimizer state whole on every replica; ``fsdp2`` divides
            them over the replicas (tied weights stay whole).
        reshard_after_forward: With ``fsdp2``: free a layer's gathered parameters after every forward pass instead of
            once per step. Less memory, more communication.
    """

    replicas: int | None = Field(default=None, ge=1)
    sharding: str = "none"
    reshard_after_forward: bool = False

    _known_sharding = field_validator("sharding")(one_of("sharding", SHARDINGS))

    @property
    def sharded(self) -> bool:
        """Whether each replica holds a part of what the others do not."""
        return self.sharding != "none"

    @model_validator(mode="after")
    def _check_resharding(self) -> Self:
        if self.reshard_after_forward and not self.sharded:
            raise ValueError("reshard_after_forward has no meaning without sharding; set sharding: fsdp2 or remove it")
        if self.sharded and self.replicas == 1:
            raise ValueError(
                f"sharding={self.sharding} divides over replicas, of which there is 1; take more, or sharding: none"
            )
        return self


class TensorParallelSection(Section):
    """Layers divided over ranks, each of which computes a part of every product.

    Attributes:
        size: Ranks that share each layer; 1 divides nothing.
    """

    size: int = Field(default=1, ge=1)


class CompileSection(Section):
    """Layers compiled by ``torch.compile``, each by itself, for shapes that may change.

    Attributes:
        enabled: Whether layers are compiled; the first step of every shape then takes long.
        backend: The compiler, as ``torch.compile`` names it.
        mode: Of the ``inductor`` backend: ``default`` or ``max-autotune-no-cudagraphs``. Those that replay CUDA graphs
            overwrite the output of one micro-batch by the next one's, and a pipeline has several under way.
        layers: Class names of the layers to compile; empty compiles all.
    """

    enabled: bool = False
    backend: str = "inductor"
    mode: str | None = None
    layers: tuple[str, ...] = ()

    @field_validator("mode")
    @classmethod
    def _check_mode(cls, value: str | None) -> str | None:
        return value if value is None else one_of("mode", COMPILE_MODES)(value)

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        if self.mode is not None and self.backend != "inductor":
            raise ValueError(f"mode={self.mode} is one of inductor's, but backend is {self.backend}; remove mode")
        return self


class TrainSection(Section):
    """How much to train, and when to look at it. Exactly one of ``steps`` and ``total_tokens`` is given.

    Attributes:
        global_batch_size: Samples per optimizer step, over all replicas.
        micro_batch_size: Samples per forward pass.
        steps: Optimizer steps.
        total_tokens: Tokens to read; the run stops after the last whole step within them.
        eval_every: Steps between evaluations; 0 evaluates at the end only.
        eval_batches: Global batches per evaluation.
        log_every: Steps between lines of the display where there is no terminal.
        checkpoint_every: Steps between checkpoints; 0 writes one at the end only.
        keep_checkpoints: Newest complete checkpoints that are kept.
        loss_weighting: ``tokens`` weighs micro-batches by the labels that count (those that are not -100), so the loss
            is the mean over all real tokens of the global batch; ``micro_batches`` weighs them alike. A model that
            returns its loss itself keeps its labels to itself: there they weigh alike.
    """

    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    steps: int | None = Field(default=None, ge=1)
    total_tokens: int | None = Field(default=None, ge=1)
    eval_every: int = Field(default=0, ge=0)
    eval_batches: int = Field(default=8, ge=1)
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=0, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    loss_weighting: str = "tokens"

    _known_weighting = field_validator("loss_weighting")(one_of("loss weighting", LOSS_WEIGHTINGS))

    @model_validator(mode="after")
    def _check_length_and_batch(self) -> Self:
        if (self.steps is None) == (self.total_tokens is None):
            given = "neither" if self.steps is None else f"steps={self.steps} and total_tokens={self.total_tokens}"
            raise ValueError(f"give exactly one of steps and total_tokens to say when training ends; got {given}")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by "
                f"micro_batch_size={self.micro_batch_size}; make it a multiple of "
                "micro_batch_size * replicas"
            )
        return self


class DataSection(Section):
    """Where the tokens lie.

    Attributes:
        train: Path of the training data: a ``.bin/.idx`` prefix, Parquet or JSONL; or a table of such paths by name,
            whose weights are ``sampling.mixture``. None when an object is given.
        heldout: Path of the held-out data, of any kind that holds tokens; rows of a table are laid end to end. None
            evaluates on nothing.
        tokenizer: Path of the ``tokenizer.json`` that made the tokens: gives the vocabulary's size and bits per byte.
        sequence_length: Tokens per training sample; None takes ``model.context``.
        cut: How a token corpus becomes samples. ``windows``: its documents end to end, in windows of
            ``sequence_length``. ``documents``: each by itself, in pieces of up to ``sequence_length``. ``powers``: the
            same in pieces whose lengths are powers of two. These two are for ``batching.token_budget``.
            ``packed``: whole documents together in rows of ``sequence_length``, by best fit; attention stays inside
            each.
        column: Which column of a table holds the tokens; None takes the first of the usual names.
    """

    train: str | dict[str, str] | None = None
    heldout: str | None = None
    tokenizer: str | None = None
    sequence_length: int | None = Field(default=None, ge=1)
    cut: Literal["windows", "documents", "powers", "packed"] = "windows"
    column: str | None = None


class CompressionSection(Section):
    """Gradients on the wire between replicas, when the reducer exchanges them.

    With ``algorithm: none`` the other keys wait for an algorithm, but for ``bucket_mb`` and ``replicas_per_machine``.

    Attributes:
        algorithm: ``none``, ``fp16``, ``bf16``, ``fp8``, ``int8``, ``int4``, ``int2``, ``onebit``, ``topk``,
            ``topk_int2``, ``randomk``, ``dct_topk``, ``powersgd``, or a name that you registered.
        error_feedback: Whether what compression loses is added to the next gradient; ``ef21`` sends differences from an
            estimate that both ends keep instead.
        error_decay: Share of the old error that the memory keeps in a moving average, in ``[0, 1)``; 0 is exact.
        error_reset_every: Empty the error memory every so many steps; 0 for never.
        full_precision: Patterns of parameter names that go uncompressed, for example ``["*embed*"]``.
        min_dimensions: Parameters with fewer axes go uncompressed: 2 leaves out norms and biases.
        replicas_per_machine: Replicas that share a machine (neighbours in rank order): summed there in full precision,
            compressed between machines. 1 treats all alike.
        warmup_steps: Steps exchanged uncompressed first.
        bucket_mb: Size of a bucket in MiB of gradients.
        options: Passed to the algorithm's configuration, for example ``{block_size: 4096}``.
        weights: What weights that ``data_parallel.sharding`` divides are compressed with where they are gathered:
            ``none``, ``bf16``, ``fp8``, ``int8`` or the like. All replicas compute with the same rounded weights; the
            parts that the optimizer updates keep every bit.
        weights_options: Passed to that algorithm's configuration.
    """

    algorithm: str = "none"
    error_feedback: bool | Literal["ef21"] = True
    error_decay: float = Field(default=0.0, ge=0, lt=1)
    error_reset_every: int = Field(default=0, ge=0)
    full_precision: list[str] = Field(default_factory=list)
    min_dimensions: int = Field(default=0, ge=0)
    replicas_per_machine: int = Field(default=1, ge=1)
    warmup_steps: int = Field(default=0, ge=0)
    bucket_mb: float = Field(default=25.0, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)
    weights: str = "none"
    weights_options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        algorithm = create_compression_algorithm(self.weights, self.weights_options)
        if self.weights != "none":
            from penstock.compression.sharded import check_for_weights  # FSDP2 takes half a second to import

            check_for_weights(algorithm)
        return self

    @model_validator(mode="after")
    def _check_algorithm(self) -> Self:
        algorithm = create_compression_algorithm(self.algorithm, self.options)
        rule = self.feedback()
        if isinstance(rule, FeedbackRule):
            rule.check_sum(algorithm)
        elif self.error_decay or self.error_reset_every:
            raise ValueError(
                f"compression.error_decay={self.error_decay:g} and error_reset_every={self.error_reset_every} are of "
                "an error memory, which error_feedback: false does without; remove them, or set error_feedback: true"
            )
        if not self.error_feedback and algorithm.name == "powersgd":
            raise ValueError(
                "compression.algorithm=powersgd without error feedback loses all but a few directions for good; set "
                "compression.error_feedback: true"
            )
        if self.replicas_per_machine > 1 and algorithm.shaped:
            raise ValueError(
                f"compression.algorithm={self.algorithm} compresses whole matrices, but replicas_per_machine="
                f"{self.replicas_per_machine} cuts them into shards; take another algorithm, or replicas_per_machine: 1"
            )
        return self

    def check_sharded(self, sharding: str) -> None:
        """Refuse what cannot be done to a layer's gradients in one buffer.

        Raises:
            ValueError: A key does not go with sharded gradients.
        """
        if self.algorithm == "none":
            return
        if create_compression_algorithm(self.algorithm, self.options).shaped:
            raise ValueError(
                f"compression.algorithm={self.algorithm} compresses whole matrices, but data_parallel.sharding="
                f"{sharding} divides them; take another algorithm (int8 or onebit, for example), or sharding: none"
            )
        for name, field in type(self).model_fields.items():
            if name in ("full_precision", "min_dimensions", "replicas_per_machine", "bucket_mb"):
                value, default = getattr(self, name), field.get_default(call_default_factory=True)
                if value != default:
                    raise ValueError(
                        f"compression.{name}={value} cannot be had with data_parallel.sharding={sharding}, which sums "
                        f"each layer's gradients in one buffer over all replicas; leave {name} out, or set "
                        "sharding: none"
                    )

    def feedback(self) -> bool | FeedbackRule:
        """What the reducer takes for ``error_feedback``."""
        if not self.error_feedback:
            return False
        kind: Literal["classic", "ef21"] = "ef21" if self.error_feedback == "ef21" else "classic"
        return FeedbackRule(kind, decay=self.error_decay, reset_every=self.error_reset_every)


class ScheduleSection(Section):
    """The learning rate over the run, keyed by tokens consumed; see :class:`penstock.runtime.lr_schedule.LRSchedule`.

    Attributes:
        by: ``tokens`` read, or ``layer_tokens``: tokens computed, summed over the blocks, for runs that drop tokens.
            The other keys' tokens are these.
        warmup_tokens: Tokens of linear warm-up.
        warmup_steps: The same, in steps. At most one of the two is given; without both there is no warm-up.
        decay: ``cosine``, ``linear`` or ``constant`` after warm-up.
        min_ratio: Final learning rate over the peak, in ``[0, 1]``.
        total_tokens: Tokens at which the decay ends; None takes the length of the run.
    """

    by: Literal["tokens", "layer_tokens"] = "tokens"
    warmup_tokens: int | None = Field(default=None, ge=0)
    warmup_steps: int | None = Field(default=None, ge=0)
    decay: str = "cosine"
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    total_tokens: int | None = Field(default=None, ge=1)

    _known_decay = field_validator("decay")(one_of("decay", DECAYS))

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_tokens is not None and self.warmup_steps is not None:
            raise ValueError(
                f"give at most one of warmup_tokens={self.warmup_tokens} and warmup_steps={self.warmup_steps}"
            )
        return self


class FP16Section(Section):
    """Loss scaling with ``precision: fp16``; the keys and rules are those of DeepSpeed's ``fp16`` section.

    Attributes:
        loss_scale: A fixed scale; 0 adapts it to what the gradients do.
        initial_scale_power: The first scale is 2 to this power.
        loss_scale_window: Steps without overflow after which the scale doubles.
        hysteresis: Overflows until the scale halves; steps that overflow are skipped all the same.
        consecutive_hysteresis: Whether a step without overflow makes up for earlier overflows.
        min_loss_scale: The smallest scale; an overflow there ends the run.
    """

    loss_scale: float = Field(default=0.0, ge=0)
    initial_scale_power: int = Field(default=16, ge=0, le=60)
    loss_scale_window: int = Field(default=1000, ge=1)
    hysteresis: int = Field(default=2, ge=1)
    consecutive_hysteresis: bool = False
    min_loss_scale: float = Field(default=1.0, gt=0)

    @property
    def dynamic(self) -> bool:
        """Whether the scale adapts."""
        return self.loss_scale == 0.0

    @property
    def initial_scale(self) -> float:
        """The scale of the first step."""
        return 2.0**self.initial_scale_power if self.dynamic else self.loss_scale

    @model_validator(mode="after")
    def _check_scales(self) -> Self:
        if self.dynamic and self.initial_scale < self.min_loss_scale:
            raise ValueError(
                f"initial_scale_power={self.initial_scale_power} starts at a scale of {self.initial_scale:g}, below "
                f"min_loss_scale={self.min_loss_scale:g}; raise the one or lower the other"
            )
        return self


def check_precision(value: str) -> str:
    """The canonical name of a precision that the engine trains in."""
    return one_of("precision", PRECISIONS)(_OTHER_NAMES.get(value, value))
