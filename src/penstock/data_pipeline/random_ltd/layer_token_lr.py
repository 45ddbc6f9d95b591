"""The learning rate by layer-tokens (Yao et al., "Random-LTD", arXiv:2211.11586, on the LayerToken schedule)."""

import math

from penstock.data_pipeline.random_ltd.config import LayerTokenLR


def layer_token_factor(section: LayerTokenLR, consumed: int, step_tokens: int) -> float:
    """The learning rate of a step over the peak.

    In warm-up it is that of the step's end, so that the first step learns and the last one reaches the peak;
    afterwards it is that of the step's beginning.

    Args:
        section: The schedule, enabled.
        consumed: Layer-tokens before the step.
        step_tokens: Layer-tokens of the step.

    Returns:
        A factor in ``[0, 1]``.
    """
    total, warmup = section.total_layer_tokens, section.warmup_layer_tokens or 0
    assert total is not None  # checked where the section is read
    if consumed < warmup:
        reached = min(consumed + step_tokens, warmup)
        return math.log1p(reached) / math.log1p(warmup) if section.warmup_type == "log" else reached / warmup
    if section.decay_type == "constant":
        return 1.0
    progress = min(1.0, (consumed - warmup) / (total - warmup)) if total > warmup else 1.0
    remaining = 1.0 - progress if section.decay_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.min_ratio + (1.0 - section.min_ratio) * remaining
