"""An order in which every stretch mirrors the strata's proportions."""

from typing import Any

import numpy as np
import numpy.typing as npt

from penstock._core.keys import derive, random_words
from penstock.data_pipeline.data_sampling.order import IntArray, digest_of
from penstock.data_pipeline.data_sampling.permutation import permute


class StratifiedOrder:
    """Strata spaced evenly over each epoch, without replacement; within a stratum the order is keyed.

    The ``j``-th sample of a stratum of ``n`` stands where a fraction ``(j + 1/2) / n`` of the epoch has passed (the
    highest-averages rule of Webster and Sainte-Laguë), so every prefix and every batch holds each stratum in
    proportion. Takes 16 bytes of memory per sample.

    Args:
        labels: The stratum of each sample: one dimension of numbers or strings.
        seed: The key of all permutations.
    """

    def __init__(self, labels: npt.NDArray[Any], seed: int) -> None:
        if labels.ndim != 1:
            raise ValueError(f"expected one label per sample, got the shape {labels.shape}")
        self.epoch_size = len(labels)
        self._seed = seed
        self._labels_digest = digest_of(labels)
        _, stratum, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        # Samples of one stratum lie together, and are ranked within it.
        self._members = np.argsort(stratum, kind="stable").astype(np.int64)
        self._sizes = sizes.astype(np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        sorted_stratum = stratum[self._members]
        rank = np.arange(self.epoch_size) - self._starts[sorted_stratum]
        place = (2 * rank + 1) / (2.0 * self._sizes[sorted_stratum])
        self._slots = np.lexsort((sorted_stratum, place)).astype(np.int64)
        self._bases = random_words(derive(seed, "stratified order"), np.arange(len(sizes)))

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        epoch, place = np.divmod(k, self.epoch_size)
        slot = self._slots[place]
        stratum = np.searchsorted(self._starts, slot, side="right") - 1
        keys = random_words(derive(self._seed, "stratified epoch"), epoch) ^ self._bases[stratum]
        ranked = permute(slot - self._starts[stratum], self._sizes[stratum], keys)
        return np.asarray(self._members[self._starts[stratum] + ranked], dtype=np.int64)

    def digest(self) -> str:
        """See :class:`Order`."""
        return digest_of("stratified", self._seed, self._labels_digest)
