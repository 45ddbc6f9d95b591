"""DeepSpeed's ``random_ltd`` config section, read as it is, and what it can say beyond; an unknown key is an error."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from penstock._core.suggest import unknown_name

Count = Annotated[int, Field(ge=1, strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name in values:
                if name in ("random_ltd", "data_routing", "data_efficiency"):
                    raise ValueError(
                        f"{name!r} is a table around the section, not a key of it; pass what stands under 'random_ltd'"
                    )
                if name not in cls.model_fields:
                    raise ValueError(unknown_name("key", str(name), cls.model_fields))
        return values


class SchedulePace(_Section):
    """How fast the kept length grows, and when tokens are dropped at all.

    DeepSpeed's keys are ``require_steps`` and ``seq_per_step``. The clock is the optimizer step, or with
    ``require_tokens`` the tokens read; ``start`` and ``end`` are on the same clock.

    Attributes:
        require_steps: Steps from ``start`` until the kept length is at its maximum.
        require_tokens: The same in tokens; exactly one of the two is given.
        seq_per_step: The kept length is a multiple of this, apart from the minimum and the maximum themselves.
        root_degree: With ``fixed_root``: the kept length grows with this root of the progress, so faster at first.
        start: Where dropping begins; before it every token is kept.
        end: Where it ends, whatever the kept length by then; None does not end it.
    """

    require_steps: Count | None = None
    require_tokens: Count | None = None
    seq_per_step: Count
    root_degree: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    start: Annotated[int, Field(ge=0, strict=True)] = 0
    end: Count | None = None

    @property
    def by_tokens(self) -> bool:
        """Whether the clock counts tokens rather than steps."""
        return self.require_tokens is not None

    @property
    def required(self) -> int:
        """The clock's distance from ``start`` to the maximum."""
        found = self.require_steps if self.require_tokens is None else self.require_tokens
        assert found is not None  # one of them is given
        return found

    @model_validator(mode="after")
    def _one_clock(self) -> Self:
        if (self.require_steps is None) == (self.require_tokens is None):
            raise ValueError("give exactly one of require_steps and require_tokens")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end={self.end} is not after start={self.start}")
        return self


class KeepSchedule(_Section):
    """The kept length over the run.

    Attributes:
        min_value: Tokens kept at first.
        max_value: Tokens kept at last; the full sequence length as a rule.
        schedule_type: ``"fixed_linear"`` or ``"fixed_root"``.
        schedule_config: How fast.
    """

    min_value: Count
    max_value: Count
    schedule_type: Literal["fixed_linear", "fixed_root"] = "fixed_linear"
    schedule_config: SchedulePace

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.min_value > self.max_value:
            raise ValueError(f"min_value={self.min_value} is larger than max_value={self.max_value}")
        degree = self.schedule_config.root_degree
        if (self.schedule_type == "fixed_root") != (degree is not None):
            raise ValueError(
                f"schedule_type={self.schedule_type!r} with root_degree={degree}: fixed_root needs root_degree "
                "(2 for a square root), fixed_linear has none"
            )
        return self


class LayerTokenLR(_Section):
    """A learning rate by layer-tokens (the paper's section on it); DeepSpeed reads these keys and raises an error.

    While tokens are dropped a step computes less, and a rate that decays by steps would fall too early. This one rises
    over ``warmup_layer_tokens`` and falls until ``total_layer_tokens`` were computed, summed over layers.

    Attributes:
        enabled: Whether :meth:`RandomLTDScheduler.lr_factor_at` has a schedule.
        total_layer_tokens: Where the decay ends; ``RandomLTDScheduler.get_total_layer_tokens(steps)`` of a whole run.
        warmup_layer_tokens: Length of the warm-up.
        warmup_type: ``"linear"``, or ``"log"``: with the logarithm of the progress.
        decay_type: ``"linear"``, ``"cosine"`` or ``"constant"`` after the warm-up.
        min_ratio: Last rate over the peak.
    """

    enabled: bool = False
    total_layer_tokens: Count | None = None
    warmup_layer_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None
    warmup_type: Literal["linear", "log"] | None = None
    decay_type: Literal["linear", "cosine", "constant"] = "linear"
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.enabled and self.total_layer_tokens is None:
            raise ValueError(
                "layer_token_lr_schedule needs total_layer_tokens, where the decay ends: "
                "RandomLTDScheduler(config).get_total_layer_tokens(steps) counts those of a run"
            )
        total, warmup = self.total_layer_tokens, self.warmup_layer_tokens or 0
        if total is not None and warmup > total:
            raise ValueError(f"warmup_layer_tokens={warmup} is more than total_layer_tokens={total}")
        if self.enabled and self.warmup_type is not None and not warmup:
            raise ValueError(f"warmup_type={self.warmup_type!r} without a warm-up; set warmup_layer_tokens")
        if self.enabled and self.decay_type == "constant" and self.min_ratio:
            raise ValueError(f"min_ratio={self.min_ratio} with decay_type='constant', which never falls to it")
        return self


class RandomLTDConfig(_Section):
    """Which layers drop tokens, and how many.

    Attributes:
        enabled: False keeps every token.
        total_layer_num: Layers of the model that could drop.
        random_ltd_layer_num: How many of them do; the length of ``random_ltd_layer_id``.
        random_ltd_layer_id: Which of them do, counted from 0 in the model's order.
        model_mask_name: Name of the layers' attention-mask argument, or None.
        model_type: ``"decoder"`` or ``"encoder"``. Masks are gathered among the kept tokens for both, which for a
            causal mask is the slice that DeepSpeed takes; the field is read so that its files work unchanged.
        hidden_state_order: ``"batch_seq_dim"`` or ``"seq_batch_dim"``.
        random_ltd_schedule: The kept length over the steps.
        global_batch_size: Samples per step, for counting layer-tokens. DeepSpeed's engine adds it to the section.
        micro_batch_size: Samples per micro-batch, added by DeepSpeed's engine too; layers see it from their input.
        layer_token_lr_schedule: A learning rate by layer-tokens.
        sequence_length: Tokens of a whole sequence, for counting layer-tokens; None takes ``max_value``.
        route: ``"layer"``: each layer drops tokens of its own. ``"block"``: layers of consecutive ids drop the same
            tokens, before the first of them and until after the last (TREAD, arXiv:2501.04765).
        arguments: Kinds or layouts of the layers' arguments by name, where names and shapes do not tell
            (:class:`penstock.data_pipeline.random_ltd.layer_rule.LayerRule`).
    """

    enabled: bool = True
    total_layer_num: Count
    random_ltd_layer_num: Count
    random_ltd_layer_id: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    model_mask_name: str | None = None
    model_type: Literal["decoder", "encoder"] = "decoder"
    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] = "batch_seq_dim"
    random_ltd_schedule: KeepSchedule
    global_batch_size: Count = 1
    micro_batch_size: Count | None = None
    layer_token_lr_schedule: LayerTokenLR = LayerTokenLR()
    sequence_length: Count | None = None
    route: Literal["layer", "block"] = "layer"
    arguments: dict[str, str] = {}

    @property
    def full_length(self) -> int:
        """Tokens of a whole sequence."""
        return self.random_ltd_schedule.max_value if self.sequence_length is None else self.sequence_length

    def layer_options(self, layer_id: int) -> dict[str, Any]:
        """Keyword arguments of :class:`RandomLayerTokenDrop` for one of the layers that drop.

        Its own ``layer_id`` is among them: layers of one route are keyed by the first of them.
        """
        first = last = layer_id
        if self.route == "block":
            ids = set(self.random_ltd_layer_id)
            while first - 1 in ids:
                first -= 1
            while last + 1 in ids:
                last += 1
        part = None if first == last else "begin" if layer_id == first else "end" if layer_id == last else "inside"
        return {
            "layer_id": first,
            "mask_name": self.model_mask_name,
            "hidden_state_order": self.hidden_state_order,
            "arguments": self.arguments,
            "route": part,
        }

    @model_validator(mode="after")
    def _layers_agree(self) -> Self:
        ids = self.random_ltd_layer_id
        if len(ids) != self.random_ltd_layer_num:
            raise ValueError(
                f"random_ltd_layer_num={self.random_ltd_layer_num} but random_ltd_layer_id lists {len(ids)} layers"
            )
        if len(set(ids)) != len(ids):
            twice = sorted(one for one in set(ids) if ids.count(one) > 1)
            raise ValueError(f"random_ltd_layer_id lists {twice} more than once")
        full, kept = self.full_length, self.random_ltd_schedule.max_value
        if kept > full:
            raise ValueError(f"max_value={kept} is more than sequence_length={full}")
        if max(ids) >= self.total_layer_num:
            raise ValueError(
                f"random_ltd_layer_id={max(ids)} is not a layer: total_layer_num={self.total_layer_num} "
                f"makes the ids 0..{self.total_layer_num - 1}"
            )
        return self


def read_config(config: RandomLTDConfig | Mapping[str, Any]) -> RandomLTDConfig:
    """The section as a checked object.

    Raises:
        ValueError: A key is unknown, missing or out of range; each is named with its place in the section.
    """
    if isinstance(config, RandomLTDConfig):
        return config
    try:
        return RandomLTDConfig.model_validate(config)
    except ValidationError as error:
        lines = [_describe(one["loc"], one["msg"]) for one in error.errors(include_url=False)]
        raise ValueError("random_ltd: " + "; ".join(lines)) from error


def _describe(place: tuple[int | str, ...], message: str) -> str:
    path = ".".join(str(part) for part in place)
    text = message.removeprefix("Value error, ")
    return f"{path}: {text}" if path else text
