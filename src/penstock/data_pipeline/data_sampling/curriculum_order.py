"""The order that a curriculum makes: a growing pool of samples sorted by when they enter."""

import numpy as np

from penstock.data_pipeline.data_sampling.entry_points import EntryPoints
from penstock.data_pipeline.data_sampling.growing import GrowingOrder
from penstock.data_pipeline.data_sampling.order import IntArray, digest_of
from penstock.data_pipeline.data_sampling.pacing import Pacer


class CurriculumOrder:
    """A growing pool of samples in the order of their entry points.

    Args:
        entries: The samples sorted by when they enter.
        batch_size: Samples of a step: schedules count steps, orders count samples.
        seed: The key of all permutations.
        pacer: Decides when blocks enter; None takes the schedules' own steps.
    """

    def __init__(self, entries: EntryPoints, batch_size: int, seed: int, pacer: Pacer | None = None) -> None:
        self._entries = entries
        self._batch_size, self._seed = batch_size, seed
        self.pacer = pacer
        self.epoch_size = sum(entries.sizes)
        self._growing = self._grown()

    def _grown(self) -> GrowingOrder:
        entries, pacer = self._entries, self.pacer
        if pacer is None:
            return GrowingOrder(entries.sizes, [step * self._batch_size for step in entries.steps], self._seed)
        births = [step * self._batch_size for step in pacer.births]
        grid = pacer.config.every * self._batch_size
        return GrowingOrder(entries.sizes[: len(births)], births, self._seed, grid)

    def births_changed(self) -> None:
        """Take over what the pacer has decided or restored."""
        self._growing = self._grown()

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        return self._entries.order[self._growing(k)].astype(np.int64)

    def schedule_step(self, step: int) -> int:
        """The step of the schedules at which a run stands after ``step`` steps: the same, unless it is paced."""
        if self.pacer is None:
            return step
        stage = sum(birth <= step for birth in self.pacer.births) - 1
        return self._entries.steps[stage]

    def digest(self) -> str:
        """See :class:`Order`; of a paced curriculum without its log, which a checkpoint holds."""
        rule = None if self.pacer is None else self.pacer.config.model_dump_json()
        return digest_of("curriculum", self._entries.digest(), self._batch_size, self._seed, rule)
