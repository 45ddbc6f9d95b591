"""How many samples a step has, as a function of the tokens consumed (McCandlish et al., "An empirical model of
large-batch training", 2018, on why later steps can use more)."""

import bisect
from collections.abc import Sequence
from itertools import pairwise


class BatchSizes:
    """A batch-size schedule.

    Args:
        base: Samples of a step before the first change.
        changes: Pairs of the tokens consumed and the samples of a step from there on, rising.
        tokens_per_sample: Of full sequences, for what a whole run reads.
    """

    def __init__(self, base: int, changes: Sequence[tuple[int, int]], tokens_per_sample: int) -> None:
        changes = [(0, base), *changes] if not changes or changes[0][0] > 0 else list(changes)
        self._starts = [start for start, _ in changes]
        self._sizes = [size for _, size in changes]
        self._per_sample = tokens_per_sample

    def at(self, tokens: int) -> int:
        """Samples of the step that begins after ``tokens`` tokens."""
        return self._sizes[bisect.bisect_right(self._starts, tokens) - 1]

    def tokens_after(self, steps: int) -> int:
        """Tokens that so many steps of full sequences read."""
        tokens = 0
        for (_, end), size in zip(pairwise([*self._starts, None]), self._sizes, strict=True):
            each = size * self._per_sample
            here = steps if end is None else min(steps, max(0, -(-(end - tokens) // each)))
            tokens += here * each
            steps -= here
        return tokens

    def steps_within(self, total_tokens: int) -> int:
        """Whole steps of full sequences that fit into so many tokens."""
        tokens = steps = 0
        for (_, end), size in zip(pairwise([*self._starts, None]), self._sizes, strict=True):
            each = size * self._per_sample
            fitting = (total_tokens - tokens) // each
            until_end = fitting if end is None else max(0, -(-(end - tokens) // each))
            tokens += min(fitting, until_end) * each
            steps += min(fitting, until_end)
            if fitting < until_end:
                break
        return steps
