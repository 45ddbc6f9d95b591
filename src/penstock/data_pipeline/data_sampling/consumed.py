"""What a run has consumed, as a number that can be checked: which sample stood at which position.

Every pair of a position and a sample is hashed to 128 bits, and the hashes are added up modulo 2**128. A sum does not
depend on who adds which part when, so each rank enters what *it* read of the dataset, ranks are added together when a
checkpoint is written, and the total is the same for any number of ranks, micro-batches and restarts. From the
configuration the same sum is worked out again (:meth:`Consumed.of`); a sample left out, repeated or exchanged changes
it. (Bellare and Micciancio, "A new paradigm for collision-free hashing", EUROCRYPT 1997, study such sums. The hash
here finds mistakes; it does not withstand an adversary.)
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import numpy as np

from penstock._core.keys import MASK64, derive, mix, random_words
from penstock.data_pipeline.data_sampling.order import IntArray

_KEYS: Final = (derive("consumed samples", 0), derive("consumed samples", 1))
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
_CHUNK: Final = 1 << 20


class Consumed:
    """A sum over pairs of position and sample.

    Attributes:
        count: How many pairs were entered.
    """

    def __init__(self) -> None:
        self.count = 0
        self._words = [0, 0]

    def enter(self, positions: IntArray, samples: IntArray) -> None:
        """Enter that ``samples[i]`` was consumed at ``positions[i]`` of the run."""
        with np.errstate(over="ignore"):
            spread = samples.astype(np.uint64) * _SPREAD
            for number, key in enumerate(_KEYS):
                hashed = mix(random_words(key, positions) ^ spread)
                self._words[number] = (self._words[number] + int(np.add.reduce(hashed))) & MASK64
        self.count += len(positions)

    def add(self, other: "Consumed") -> None:
        """Enter what another one holds: another rank's part, or an earlier part of the run."""
        self.count += other.count
        self._words = [(mine + its) & MASK64 for mine, its in zip(self._words, other._words, strict=True)]

    @property
    def digest(self) -> str:
        """The sum in hexadecimal."""
        return "".join(f"{word:016x}" for word in self._words)

    @classmethod
    def of(cls, sample_at: Callable[[IntArray], IntArray], start: int, stop: int) -> Self:
        """What a run consumes at positions ``start`` to ``stop - 1`` of an order."""
        found = cls()
        for first in range(start, stop, _CHUNK):
            positions = np.arange(first, min(first + _CHUNK, stop), dtype=np.int64)
            found.enter(positions, sample_at(positions))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Count and digest, as plain values."""
        return {"count": self.count, "digest": self.digest}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: It is no such state.
        """
        count, digest = state.get("count"), state.get("digest")
        if not isinstance(count, int) or count < 0 or not isinstance(digest, str) or len(digest) != 32:
            raise ValueError(f"not an account of consumed samples: {dict(state)}")
        try:
            words = [int(digest[:16], 16), int(digest[16:], 16)]
        except ValueError:
            raise ValueError(f"not an account of consumed samples: its digest is {digest!r}") from None
        found = cls()
        found.count, found._words = count, words
        return found
