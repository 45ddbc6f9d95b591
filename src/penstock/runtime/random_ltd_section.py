"""The configuration of random layerwise token dropping, in Penstock's short form or in DeepSpeed's."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from penstock.data_pipeline.random_ltd.config import LayerTokenLR
from penstock.runtime.config_sections import Section

_DEEPSPEED_KEYS: Final = {"total_layer_num", "random_ltd_layer_num", "random_ltd_layer_id", "random_ltd_schedule"}
_CARRIED_KEYS: Final = (
    "model_mask_name",
    "model_type",
    "hidden_state_order",
    "layer_token_lr_schedule",
    "route",
    "arguments",
    "protect_tokens",
    "document_separator",
)


class RandomLTDSection(Section):
    """Random layerwise token dropping (Yao et al., "Random-LTD", 2022).

    Written as below, or as the ``random_ltd`` section of a DeepSpeed configuration, which is translated to this.

    Attributes:
        enabled: False turns the section off without removing it.
        layers: Numbers of the transformer blocks that drop tokens, from 0, or ``middle``: all but the first and last.
        min_tokens: Tokens kept per sequence at the start.
        max_tokens: Tokens kept at the end; None is the whole sequence.
        steps: Optimizer steps from ``start`` until ``max_tokens`` are kept.
        tokens: The same in tokens read; exactly one of the two is given.
        seq_per_step: The number of kept tokens grows in multiples of this.
        growth: ``linear``, or ``root``: with a root of the progress.
        root_degree: Degree of the root; 2 is a square root.
        start: Step (or tokens read) at which dropping begins.
        end: Step (or tokens read) at which it ends; None does not end it.
        route: ``layer``: each block drops tokens of its own. ``block``: neighbouring blocks drop the same tokens, once.
        protect_tokens: Token ids that are kept, as far as ``min_tokens`` has room for them.
        document_separator: The token id that ends a document; the first token of each document is kept, as far as
            ``min_tokens`` has room.
        arguments: Kinds or layouts of the blocks' arguments by name, where names and shapes do not tell.
        total_layers: DeepSpeed's ``total_layer_num``; checked against ``model.num_layers`` when given.
        model_mask_name: Name of the attention mask among a layer's arguments; None where layers take no mask.
        model_type: ``decoder`` or ``encoder``.
        hidden_state_order: ``batch_seq_dim`` or ``seq_batch_dim``.
        layer_token_lr_schedule: DeepSpeed's learning rate by layer-tokens, in the place of ``schedule``.
    """

    enabled: bool = True
    layers: tuple[int, ...] | Literal["middle"] = "middle"
    min_tokens: int = Field(ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    seq_per_step: int = Field(default=16, ge=1)
    growth: Literal["linear", "root"] = "linear"
    root_degree: float | None = Field(default=None, gt=0)
    start: int = Field(default=0, ge=0)
    end: int | None = Field(default=None, ge=1)
    route: Literal["layer", "block"] = "layer"
    protect_tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    document_separator: int | None = Field(default=None, ge=0)
    arguments: dict[str, str] = Field(default_factory=dict)
    total_layers: int | None = Field(default=None, ge=1)
    model_mask_name: str | None = None
    model_type: Literal["decoder", "encoder"] = "decoder"
    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] = "batch_seq_dim"
    layer_token_lr_schedule: LayerTokenLR | None = None

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, data: Any) -> Any:
        if isinstance(data, dict) and _DEEPSPEED_KEYS & data.keys():
            return _from_deepspeed(data)
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens: how long until max_tokens are kept")
        if (self.growth == "root") != (self.root_degree is not None):
            raise ValueError(
                "growth: root needs root_degree, the degree of the root (2 is a square root)"
                if self.root_degree is None
                else f"root_degree={self.root_degree} with growth: {self.growth}; set growth: root, or leave it out"
            )
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end={self.end} is not after start={self.start}")
        if not isinstance(self.layers, str):
            if not self.layers:
                raise ValueError("layers is empty; name the blocks that drop tokens, or set enabled: false")
            if min(self.layers) < 0 or len(set(self.layers)) != len(self.layers):
                raise ValueError(f"layers={list(self.layers)} must be different block numbers from 0")
        return self

    def layer_ids(self, num_layers: int) -> tuple[int, ...]:
        """The blocks that drop tokens in a model of ``num_layers`` blocks, sorted.

        Raises:
            ValueError: A block number is outside the model, or ``middle`` of fewer than three blocks is empty.
        """
        if self.total_layers is not None and self.total_layers != num_layers:
            raise ValueError(
                f"random_ltd.total_layer_num={self.total_layers}, but the model has {num_layers} blocks "
                "(model.num_layers); make them equal"
            )
        if isinstance(self.layers, str):
            if num_layers < 3:
                raise ValueError(
                    f"random_ltd.layers: 'middle' of {num_layers} blocks is empty (the first and the last keep all "
                    "tokens); list the blocks, or set random_ltd.enabled: false"
                )
            return tuple(range(1, num_layers - 1))
        if max(self.layers) >= num_layers:
            raise ValueError(
                f"random_ltd.layers={list(self.layers)}: the model's {num_layers} blocks are numbered "
                f"0..{num_layers - 1}"
            )
        return tuple(sorted(self.layers))

    def scheduler_config(self, num_layers: int, sequence_length: int) -> dict[str, Any]:
        """The section in DeepSpeed's form, for ``RandomLTDScheduler``.

        Args:
            num_layers: Transformer blocks of the model.
            sequence_length: Tokens per sample; what ``max_tokens=None`` stands for.
        """
        layers = self.layer_ids(num_layers)
        pace: dict[str, Any] = {"seq_per_step": self.seq_per_step}
        pace |= {"require_steps": self.steps} if self.tokens is None else {"require_tokens": self.tokens}
        given = {"root_degree": self.root_degree, "start": self.start or None, "end": self.end}
        pace |= {key: value for key, value in given.items() if value is not None}
        section: dict[str, Any] = {
            "total_layer_num": num_layers,
            "random_ltd_layer_num": len(layers),
            "random_ltd_layer_id": list(layers),
            "random_ltd_schedule": {
                "min_value": self.min_tokens,
                "max_value": sequence_length if self.max_tokens is None else self.max_tokens,
                "schedule_type": f"fixed_{self.growth}",
                "schedule_config": pace,
            },
            "model_type": self.model_type,
            "hidden_state_order": self.hidden_state_order,
        }
        if self.model_mask_name is not None:
            section["model_mask_name"] = self.model_mask_name
        if self.route != "layer":
            section["route"] = self.route
        if self.arguments:
            section["arguments"] = self.arguments
        return section


def _from_deepspeed(data: dict[str, Any]) -> dict[str, Any]:
    """Translate DeepSpeed's section; keys that are not DeepSpeed's stay, to be refused by name."""
    rest = dict(data)
    out: dict[str, Any] = {key: rest.pop(key) for key in ("enabled", *_CARRIED_KEYS) if key in rest}
    if "random_ltd_layer_id" not in rest:
        raise ValueError(
            "DeepSpeed's form of random_ltd needs random_ltd_layer_id, the list of blocks that drop tokens"
        )
    out["layers"] = layers = rest.pop("random_ltd_layer_id")
    count = rest.pop("random_ltd_layer_num", None)
    if count is not None and isinstance(layers, list) and count != len(layers):
        raise ValueError(f"random_ltd_layer_num={count}, but random_ltd_layer_id lists {len(layers)} blocks")
    if "total_layer_num" in rest:
        out["total_layers"] = rest.pop("total_layer_num")
    schedule = _table(rest.pop("random_ltd_schedule", None), "random_ltd_schedule")
    kind = schedule.pop("schedule_type", "fixed_linear")
    if kind not in ("fixed_linear", "fixed_root"):
        raise ValueError(f"random_ltd_schedule.schedule_type={kind!r}: it is 'fixed_linear' or 'fixed_root'")
    out["growth"] = kind.removeprefix("fixed_")
    pace = _table(schedule.pop("schedule_config", None), "random_ltd_schedule.schedule_config")
    for source, key, name in (
        (schedule, "min_value", "min_tokens"),
        (schedule, "max_value", "max_tokens"),
        (pace, "require_tokens" if "require_tokens" in pace else "require_steps", None),
        (pace, "seq_per_step", "seq_per_step"),
    ):
        if key not in source:
            raise ValueError(f"DeepSpeed's form of random_ltd needs {key} in random_ltd_schedule")
        out[name or key.removeprefix("require_")] = source.pop(key)
    return {**rest, **schedule, **pace, **out}


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"DeepSpeed's form of random_ltd needs the table {name}, got {value!r}")
    return dict(value)
