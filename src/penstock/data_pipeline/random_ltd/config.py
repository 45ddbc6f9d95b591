"""DeepSpeed's ``random_ltd`` config section, read as it is; an unknown key is an error."""

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
                if name not in cls.model_fields:
                    raise ValueError(unknown_name("key", str(name), cls.model_fields))
        return values


class ScheduleSteps(_Section):
    """How fast the kept length grows.

    Attributes:
        require_steps: Step at which the kept length is at its maximum.
        seq_per_step: The kept length is a multiple of this, apart from the minimum and the maximum themselves.
    """

    require_steps: Count
    seq_per_step: Count


class KeepSchedule(_Section):
    """The kept length over the steps.

    Attributes:
        min_value: Tokens kept at step 0.
        max_value: Tokens kept from ``require_steps`` on; the full sequence length as a rule.
        schedule_type: ``"fixed_linear"``.
        schedule_config: How fast.
    """

    min_value: Count
    max_value: Count
    schedule_type: Literal["fixed_linear"] = "fixed_linear"
    schedule_config: ScheduleSteps

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_value > self.max_value:
            raise ValueError(f"min_value={self.min_value} is larger than max_value={self.max_value}")
        return self


class LayerTokenLR(_Section):
    """DeepSpeed's place for a learning rate by layer-tokens, which it never built; it can only be off.

    Attributes:
        enabled: False.
        total_layer_tokens: Part of the schedule that is off.
        warmup_type: Part of the schedule that is off.
        warmup_layer_tokens: Part of the schedule that is off.
    """

    enabled: bool = False
    total_layer_tokens: int | None = None
    warmup_type: str | None = None
    warmup_layer_tokens: int | None = None

    @model_validator(mode="after")
    def _off(self) -> Self:
        if self.enabled:
            raise ValueError(
                "layer_token_lr_schedule cannot be enabled; drive the learning rate by your own schedule over "
                "RandomLTDScheduler.consumed_layer_tokens"
            )
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
        layer_token_lr_schedule: Off.
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
