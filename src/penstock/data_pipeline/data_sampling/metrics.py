"""How difficult samples are: pure functions from flat tokens and offsets to one number per sample.

A metric that needs to know the corpus (vocabulary rarity) is a function made from its token counts. Counts of parts of
a corpus add up, so they can be gathered anywhere.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[Any]
Offsets = npt.NDArray[np.int64]
MetricFunction = Callable[[Tokens, Offsets], npt.NDArray[Any]]

MAX_VOCABULARY: Final = 1 << 26
"""Token numbers from here on are taken for a mistake when the size of the vocabulary is not given."""


def sequence_length(tokens: Tokens, offsets: Offsets) -> npt.NDArray[np.int64]:
    """Tokens of each sample; int64."""
    return np.diff(offsets)


def count_tokens(
    tokens: Tokens, counts: npt.NDArray[np.int64], vocabulary_size: int | None = None
) -> npt.NDArray[np.int64]:
    """Add the tokens to the counts of each token number.

    Args:
        tokens: Integers of any type.
        counts: What was counted before; may be too short for the numbers that come now.
        vocabulary_size: Token numbers must be below this; below :data:`MAX_VOCABULARY` if None.

    Returns:
        The sums, int64; ``counts`` itself, added to in place, if it was long enough.

    Raises:
        ValueError: The tokens are not integers, or one is negative or beyond the vocabulary.
    """
    if not tokens.size:
        return counts
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"only integer tokens can be counted, got {tokens.dtype}; seqlen needs no counts")
    low, high = int(tokens.min()), int(tokens.max())
    limit = MAX_VOCABULARY if vocabulary_size is None else vocabulary_size
    if low < 0 or high >= limit:
        raise ValueError(
            f"token numbers run from {low} to {high}, but the vocabulary has {limit}; "
            "give the right vocabulary_size, or mend the tokens"
        )
    if tokens.dtype == np.uint64:  # the one type that bincount does not take as it is
        tokens = tokens.astype(np.int64)
    found = np.bincount(tokens, minlength=len(counts))
    if len(found) > len(counts):
        found[: len(counts)] += counts
        return found.astype(np.int64, copy=False)
    counts += found
    return counts


def vocabulary_rarity(counts: npt.NDArray[np.int64]) -> MetricFunction:
    """The metric: mean over a sample's tokens of ``-log p(token)``, in nats, with ``p`` from the corpus's counts.

    Args:
        counts: How often each token number occurs in the corpus, which must include the samples.

    Returns:
        A function from tokens and offsets to float64 values; a sample without tokens gets 0.
    """
    total = int(counts.sum())
    with np.errstate(divide="ignore"):
        surprise = np.log(max(total, 1)) - np.log(counts.astype(np.float64))

    def rarity(tokens: Tokens, offsets: Offsets) -> npt.NDArray[np.float64]:
        lengths = np.diff(offsets)
        values = np.zeros(len(lengths))
        filled = np.flatnonzero(lengths)
        if filled.size:
            # Over filled samples alone: reduceat would take a token of the next sample for an empty one.
            # The tokens were counted, so none is beyond the table; "clip" spares numpy a second look at each.
            found = np.take(surprise, tokens, mode="clip")
            values[filled] = np.add.reduceat(found, offsets[filled]) / lengths[filled]
        return values

    return rarity
