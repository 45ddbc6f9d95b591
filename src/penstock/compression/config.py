"""What a user writes to choose a compressor."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from penstock._core.suggest import unknown_name
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.error_feedback import FeedbackRule
from penstock.compression.registry import create_compression_algorithm


class CompressionConfig(BaseModel):
    """An algorithm by name, its options, and whether what it leaves out is carried over.

    Unknown keys, algorithms and options are refused, with the nearest known name.

    Attributes:
        algorithm: A registered name, see :func:`~penstock.compression.known_algorithms`.
        options: Keyword arguments of the algorithm.
        error_feedback: Keep what was not sent in a memory and add it to the next tensor; ``ef21`` keeps an estimate.
        error_decay: See :class:`~penstock.compression.FeedbackRule`.
        error_reset_every: The same.
        warmup_steps: Calls for each name that pass uncompressed first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithm: str = "onebit"
    options: dict[str, Any] = Field(default_factory=dict)
    error_feedback: bool | Literal["ef21"] = True
    error_decay: float = 0.0
    error_reset_every: int = 0
    warmup_steps: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(unknown_name("key", str(key), cls.model_fields))
        return values

    @model_validator(mode="after")
    def _known(self) -> Self:
        algorithm, rule = self.create(), self.feedback()
        if rule is not None and not algorithm.lossless:
            rule.check(algorithm)
        if rule is None and (self.error_decay or self.error_reset_every):
            raise ValueError(
                f"error_decay={self.error_decay:g} and error_reset_every={self.error_reset_every} are of an error "
                "memory, which error_feedback: false does without; remove them, or set error_feedback: true"
            )
        return self

    def feedback(self) -> FeedbackRule | None:
        """How errors are carried over; None where they are let go."""
        if not self.error_feedback:
            return None
        kind: Literal["classic", "ef21"] = "ef21" if self.error_feedback == "ef21" else "classic"
        return FeedbackRule(kind, decay=self.error_decay, reset_every=self.error_reset_every)

    def create(self) -> CompressionAlgorithm:
        """The algorithm that this configuration names."""
        return create_compression_algorithm(self.algorithm, self.options)
