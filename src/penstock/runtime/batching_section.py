"""The ``batching`` section: how many samples and tokens a step reads, where that changes during the run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from penstock.data_pipeline.data_sampling.curriculum import (
    CurriculumScheduler,
    Number,
    ScheduleConfig,
    ScheduleDetails,
    ScheduleType,
)
from penstock.data_pipeline.data_sampling.token_budget import TokenBudgetConfig
from penstock.runtime.config_sections import Section


class SequenceLengthSection(Section):
    """Shorter sequences at first; the keys besides ``mode`` are those of a difficulty schedule, in tokens and steps.

    Attributes:
        mode: ``truncate`` keeps the beginning of each sequence and leaves out the rest. ``reshape`` cuts sequences into
            several shorter ones, so that a step reads as many tokens as ever.
        min_difficulty: Tokens of a sequence at the start.
        max_difficulty: Tokens of a sequence at the end.
        schedule_type: As in a curriculum.
        schedule_config: As in a curriculum.
    """

    mode: Literal["truncate", "reshape"]
    min_difficulty: Number | None = None
    max_difficulty: Number | None = None
    schedule_type: ScheduleType
    schedule_config: ScheduleDetails = Field(default_factory=ScheduleDetails)

    @model_validator(mode="after")
    def _check(self) -> Self:
        scheduler = self.scheduler()
        if scheduler.min_difficulty < 1:
            raise ValueError(f"sequences have at least 1 token, but the schedule begins at {scheduler.min_difficulty}")
        return self

    def scheduler(self) -> CurriculumScheduler:
        """The length of each step."""
        return CurriculumScheduler(ScheduleConfig(**self.model_dump(exclude={"mode"})))


class BatchingSection(Section):
    """Steps that differ in samples and tokens; without these keys each reads ``train.global_batch_size`` samples.

    Attributes:
        sizes: A batch-size schedule: pairs of the tokens consumed and the samples of a step from there on. Each size is
            a multiple of the micro-batches of a step, whose rows grow.
        token_budget: Micro-batches of about equal tokens instead of equal rows, from samples of any lengths.
        sequence_length: Shorter sequences at first.
        lr_scaling: ``linear`` or ``sqrt``: scale the learning rate by a step's samples over
            ``train.global_batch_size``, or by the root of that; ``none`` leaves it.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    token_budget: TokenBudgetConfig | None = None
    sequence_length: SequenceLengthSection | None = None
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokens = [start for start, _ in self.sizes]
        if any(start < 0 or size < 1 for start, size in self.sizes) or tokens != sorted(set(tokens)):
            raise ValueError(
                "batching.sizes are pairs (tokens consumed, samples per step) with rising tokens and at least 1 "
                f"sample, got {[list(pair) for pair in self.sizes]}"
            )
        if self.token_budget is not None and (self.sizes or self.sequence_length is not None):
            other = "sizes" if self.sizes else "sequence_length"
            raise ValueError(
                f"batching.token_budget and batching.{other} both decide how much a step reads; keep one of them"
            )
        if self.lr_scaling != "none" and not self.sizes and self.token_budget is None:
            raise ValueError(
                f"batching.lr_scaling={self.lr_scaling} has no effect where all steps have as many samples; give "
                "sizes or token_budget, or remove it"
            )
        return self
