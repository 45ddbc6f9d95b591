"""The learning rate as a pure function of the tokens consumed.

Keyed by tokens and not by steps, the schedule stays right when the sequence length changes during the run (Li et al.,
"The Stability-Efficiency Dilemma", NeurIPS 2022): a step that reads less advances the schedule less. Nothing is
carried from step to step, so a resumed run continues on the same curve.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from penstock._core.suggest import unknown_name
from penstock.runtime.config import TrainConfig
from penstock.runtime.config_sections import DECAYS


@dataclass(frozen=True, slots=True)
class LRSchedule:
    """Warm-up to ``peak``, then decay to ``min_ratio * peak`` (cosine: Loshchilov and Hutter, "SGDR", 2017).

    Attributes:
        peak: Learning rate at the end of warm-up.
        total_tokens: Tokens at which the decay ends; the rate stays there afterwards.
        warmup_tokens: Tokens of warm-up, at most ``total_tokens``.
        decay: ``cosine``, ``linear`` or ``constant``.
        min_ratio: Final rate over the peak, in ``[0, 1]``; without effect when ``decay`` is ``constant``.
        by: What its tokens are: ``tokens`` read, or ``layer_tokens``: computed, summed over the blocks (Yao et al.,
            "Random-LTD", arXiv:2211.11586: while tokens are dropped, a step counts for less).
        warmup: ``linear``, or ``log``: with the logarithm of the tokens.
    """

    peak: float
    total_tokens: int
    warmup_tokens: int = 0
    decay: str = "cosine"
    min_ratio: float = 0.1
    by: str = "tokens"
    warmup: str = "linear"

    def __post_init__(self) -> None:
        if not (self.peak > 0 and math.isfinite(self.peak)):
            raise ValueError(f"the peak learning rate must be positive and finite, got {self.peak}")
        if self.total_tokens < 1:
            raise ValueError(f"a learning rate schedule needs at least one token, got total_tokens={self.total_tokens}")
        if not 0 <= self.warmup_tokens <= self.total_tokens:
            raise ValueError(
                f"warm-up of {self.warmup_tokens} tokens does not fit into total_tokens={self.total_tokens}; "
                "shorten the warm-up or lengthen the run"
            )
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio must lie in [0, 1], got {self.min_ratio}")
        if self.decay not in DECAYS:
            raise ValueError(unknown_name("decay", self.decay, DECAYS))

    def lr_at(self, tokens: int) -> float:
        """The learning rate of the step that *begins* after ``tokens`` tokens were consumed.

        Args:
            tokens: Tokens consumed so far, at least 0. During a warm-up of ``w`` tokens the rate is
                ``peak * tokens / w``, or ``peak * log(1 + tokens) / log(1 + w)``; a step from 0 tokens would learn
                nothing, so callers ask at the *end* of a step (:meth:`lr_for_step`) where that matters.

        Returns:
            The rate, in ``[0, peak]``.
        """
        if tokens < 0:
            raise ValueError(f"tokens consumed cannot be negative, got {tokens}")
        if tokens < self.warmup_tokens:
            if self.warmup == "log":
                return self.peak * math.log1p(tokens) / math.log1p(self.warmup_tokens)
            return self.peak * tokens / self.warmup_tokens
        if self.decay == "constant":
            return self.peak
        span = self.total_tokens - self.warmup_tokens
        progress = min(1.0, (tokens - self.warmup_tokens) / span) if span else 1.0
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0 - progress
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * remaining)

    def lr_for_step(self, consumed: int, step_tokens: int) -> float:
        """The rate of a step that starts at ``consumed`` tokens and reads ``step_tokens``.

        In warm-up the rate is that of the step's end, so the first step already learns and the warm-up's last one
        reaches the peak; afterwards it is that of the step's start.
        """
        if consumed < self.warmup_tokens:
            return self.lr_at(min(consumed + step_tokens, self.warmup_tokens))
        return self.lr_at(consumed)


def lr_schedule(
    config: TrainConfig, *, tokens_per_step: int | None = None, layer_tokens: Callable[[int], int] | None = None
) -> LRSchedule:
    """The schedule that a configuration describes.

    Args:
        config: The run's configuration.
        tokens_per_step: Tokens of a global batch of full sequences; None takes the configuration's.
        layer_tokens: Layer-tokens of a number of the run's first steps; needed where layers drop tokens.

    Raises:
        ValueError: The tokens per step are unknown, or the warm-up is longer than the run.
    """
    per_step = config.tokens_per_step if tokens_per_step is None else tokens_per_step
    if per_step is None:
        raise ValueError(
            "the learning rate is keyed by tokens, but the tokens per step are unknown; set data.sequence_length"
        )
    if config.lr_by_deepspeeds_section:
        assert config.random_ltd is not None  # it is the section's
        deepspeeds = config.random_ltd.layer_token_lr_schedule
        assert deepspeeds is not None
        assert deepspeeds.total_layer_tokens is not None  # checked where the section is read
        return LRSchedule(
            config.optimizer.lr,
            deepspeeds.total_layer_tokens,
            deepspeeds.warmup_layer_tokens or 0,
            deepspeeds.decay_type,
            deepspeeds.min_ratio,
            by="layer_tokens",
            warmup=deepspeeds.warmup_type or "linear",
        )
    section = config.schedule
    in_steps: Callable[[int], int] = per_step.__mul__
    if section.by == "layer_tokens":
        assert layer_tokens is not None  # refused without dropping
        in_steps = layer_tokens
    total = section.total_tokens
    if total is None:
        in_tokens = config.tokens_of_run if section.by == "tokens" else None
        total = in_tokens or in_steps(config.total_steps)
    warmup = section.warmup_tokens
    if warmup is None:
        warmup = in_steps(section.warmup_steps or 0)
    if warmup > total:
        raise ValueError(
            f"schedule: warm-up of {warmup} {section.by.replace('_', '-')} is longer than the {total} of the schedule "
            f"({in_steps(1)} per step); shorten the warm-up or train longer"
        )
    return LRSchedule(config.optimizer.lr, total, warmup, section.decay, section.min_ratio, section.by)
