"""Several corpora in one order, each by its weight."""

from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from penstock._core.keys import derive
from penstock._core.suggest import unknown_name
from penstock.data_pipeline.data_sampling.order import IntArray, Order, SequentialOrder, ShuffledOrder, digest_of
from penstock.data_pipeline.data_sampling.turns import Turns
from penstock.data_pipeline.datasets.corpora import Corpora


class CorpusConfig(BaseModel):
    """A corpus in a mixture.

    Attributes:
        weight: Its weight among the others', or pairs of a place in the run and the weight from there on, from 0.
        repeat: Whether it may begin anew when it is used up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float | list[tuple[int, float]]
    repeat: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        pairs = self.changes
        for _, weight in pairs:
            if not (0 <= weight < float("inf")):
                raise ValueError(f"a weight is a finite number, at least 0, got {weight}")
        places = [place for place, _ in pairs]
        if not places or places[0] != 0 or places != sorted(set(places)):
            raise ValueError(f"the places of weights rise from 0, got {places}")
        return self

    @property
    def changes(self) -> list[tuple[int, float]]:
        """Pairs of a place and the weight from there on."""
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]

    def weight_at(self, place: int) -> float:
        """The weight at a place."""
        return [weight for start, weight in self.changes if start <= place][-1]


class MixtureConfig(BaseModel):
    """Weights over corpora.

    Attributes:
        corpora: By name: each one's weight, and whether it may repeat. See :class:`CorpusConfig`.
        by: What the places of changing weights count: ``steps`` of ``batch_size`` samples, ``samples``, or ``tokens``.
        tokens_per_sample: ``tokens``: how many a sample has. A run takes its sequence length.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpora: dict[str, CorpusConfig] = Field(min_length=1)
    by: Literal["steps", "samples", "tokens"] = "steps"
    tokens_per_sample: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for place in self.places:
            if not any(corpus.weight_at(place) for corpus in self.corpora.values()):
                raise ValueError(f"from {place} {self.by} on all weights are 0; give one corpus a weight above 0")
        return self

    @property
    def places(self) -> list[int]:
        """Where a weight changes, from 0."""
        return sorted({place for corpus in self.corpora.values() for place, _ in corpus.changes})

    def stages(self, batch_size: int) -> list[tuple[int, list[float]]]:
        """Pairs of a position in the run and the corpora's weights from there on.

        Raises:
            ValueError: The weights change by tokens, but nothing says how many a sample has.
        """
        if self.by == "tokens" and self.tokens_per_sample is None and self.places != [0]:
            raise ValueError("a mixture whose weights change by tokens needs tokens_per_sample")
        each = {"steps": batch_size, "samples": 1, "tokens": 1}[self.by]
        parts = self.tokens_per_sample if self.by == "tokens" and self.tokens_per_sample is not None else 1
        stages: dict[int, list[float]] = {}
        for place in self.places:  # of two that fall on one sample the later one holds
            stages[-(-place * each // parts)] = [corpus.weight_at(place) for corpus in self.corpora.values()]
        return list(stages.items())


class MixtureOrder:
    """At any prefix each corpus' count differs from the sum of its shares by less than one sample.

    Inside a corpus its samples come in an order of their own, pass after pass.

    Args:
        config: The weights, of the corpora's names.
        corpora: The corpora.
        batch_size: Samples of a step.
        seed: Shuffles each corpus, each pass anew; None reads each in its own order.

    Attributes:
        epoch_size: Positions until a corpus that does not repeat would have to, or where all repeat, as many as there
            are samples.

    Raises:
        ValueError: The names differ, or too many corpora.
    """

    def __init__(self, config: MixtureConfig, corpora: Corpora, batch_size: int, seed: int | None) -> None:
        for name in config.corpora:
            if name not in corpora.names:
                raise ValueError(f"mixture: {unknown_name('corpus', name, corpora.names)}")
        for name in corpora.names:
            if name not in config.corpora:
                raise ValueError(f"mixture: no weight for the corpus {name!r}; give it one (0 leaves it out)")
        chosen = [config.corpora[name] for name in corpora.names]
        config = config.model_copy(update={"corpora": dict(zip(corpora.names, chosen, strict=True))})
        self._names, self._sizes = corpora.names, corpora.sizes
        self._offsets = corpora.starts
        self._stages = config.stages(batch_size)
        self._turns = Turns(self._stages)
        self._repeats = [corpus.repeat for corpus in chosen]
        self._inner: list[Order] = [
            SequentialOrder(size) if seed is None else ShuffledOrder(size, derive(seed, "mixture", name))
            for name, size in zip(self._names, self._sizes, strict=True)
        ]
        self._seed = seed
        self.epoch_size = self._longest()

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        corpus, turn = self._turns(k)
        result = np.empty(len(k), dtype=np.int64)
        for number in np.unique(corpus):
            here = corpus == number
            result[here] = self._inner[number](turn[here]) + self._offsets[number]
        return result

    def digest(self) -> str:
        """See :class:`Order`."""
        # Shares instead of weights: 7 and 3 are the same order as 0.7 and 0.3.
        stages = [(start, shares) for (start, _), shares in zip(self._stages, self._turns.shares, strict=True)]
        return digest_of("mixture", list(self._names), list(self._sizes), stages, self._seed)

    def shares(self) -> list[tuple[int, dict[str, float]]]:
        """Pairs of a position and each corpus' share from there on."""
        return [
            (start, {name: number / sum(shares) for name, number in zip(self._names, shares, strict=True)})
            for (start, _), shares in zip(self._stages, self._turns.shares, strict=True)
        ]

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the first ``samples`` positions are of each corpus."""
        return dict(zip(self._names, self._turns.counts(samples).tolist(), strict=True))

    def check_length(self, samples: int) -> None:
        """Check that no corpus that does not repeat is used up by a run of so many samples.

        Raises:
            ValueError: One is; the message has the numbers.
        """
        for name, size, repeat, count in zip(
            self._names, self._sizes, self._repeats, self._turns.counts(samples), strict=True
        ):
            if count > size and not repeat:
                raise ValueError(
                    f"mixture: {samples:,} samples take {count:,} of the corpus {name!r}, which has {size:,}; set its "
                    f"repeat: true, lower its weight, or end after {self._longest():,} samples"
                )

    def _longest(self) -> int:
        limits = [size for size, repeat in zip(self._sizes, self._repeats, strict=True) if not repeat]
        total = sum(self._sizes)
        if not limits:
            return total
        sizes = np.array(self._sizes)
        once = ~np.array(self._repeats)

        def fits(samples: int) -> bool:
            return bool((self._turns.counts(samples) <= sizes)[once].all())

        low, high = 0, total
        while fits(high) and high < 1 << 50:  # at 2**50 they have no weight to the end
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low if high < 1 << 50 else total
