"""Orders in which a sample's weight says how early, or how often, it comes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from penstock._core.keys import derive, random_floats
from penstock.data_pipeline.data_sampling.order import IntArray, digest_of


class WeightedOrder:
    """Samples drawn one after another in proportion to their weights, without replacement within an epoch.

    Each epoch is a race: sample ``i`` arrives at ``-log(u) / weight`` for a keyed uniform ``u`` of its own, and the
    order of arrival is that of successive weighted draws (Efraimidis and Spirakis, "Weighted random sampling with a
    reservoir", 2006). Arrivals are compared by their logarithms, so that weights may differ by any factor. A sample of
    weight 0 never comes. The arrivals of an epoch are sorted when the epoch is first asked for and kept until another
    is: O(N log N) time and 8 bytes per sample.

    Args:
        log_weights: The logarithm of each sample's weight, float64; minus infinity of weight 0 (:func:`log_weights`).
        seed: The key of all races.
        samples_per_epoch: End each epoch after this many draws; all samples of positive weight if None.

    Raises:
        ValueError: An epoch is longer than there are samples.
    """

    def __init__(self, log_weights: npt.NDArray[np.float64], seed: int, samples_per_epoch: int | None = None) -> None:
        self._log_weights = log_weights
        self._drawable = np.flatnonzero(log_weights > -np.inf).astype(np.int64)
        self.epoch_size = len(self._drawable) if samples_per_epoch is None else samples_per_epoch
        if not 1 <= self.epoch_size <= len(self._drawable):
            raise ValueError(
                f"samples_per_epoch={samples_per_epoch}, but {len(self._drawable)} samples have a weight above 0; "
                f"lower it, or draw with replacement"
            )
        self._seed = seed
        self._cached: tuple[int, IntArray] = (-1, self._drawable)

    def _arrivals(self, epoch: int) -> IntArray:
        cached_epoch, arrivals = self._cached
        if cached_epoch == epoch:
            return arrivals
        uniform = random_floats(derive(self._seed, "weighted order", epoch), self._drawable)
        with np.errstate(divide="ignore"):  # of a uniform number that is 0
            times = np.log(-np.log1p(-uniform)) - self._log_weights[self._drawable]
        arrivals = self._drawable[np.argsort(times, kind="stable")[: self.epoch_size]]
        self._cached = (epoch, arrivals)
        return arrivals

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        epoch, place = np.divmod(k, self.epoch_size)
        result = np.empty(len(k), dtype=np.int64)
        for number in sorted(set(epoch.tolist())):
            here = epoch == number
            result[here] = self._arrivals(number)[place[here]]
        return result

    def digest(self) -> str:
        """See :class:`Order`."""
        return digest_of("weighted", self._seed, self.epoch_size, self._log_weights)


class ReplacementOrder:
    """Every position draws independently, in proportion to the weights.

    Args:
        weights: One number per sample, at least 0 and finite.
        seed: The key of all draws.
        samples_per_epoch: What counts as an epoch; the number of samples if None.
    """

    def __init__(self, weights: npt.NDArray[Any], seed: int, samples_per_epoch: int | None = None) -> None:
        self._weights = check_weights(weights)
        self.epoch_size = len(self._weights) if samples_per_epoch is None else samples_per_epoch
        self._seed = seed
        self._key = derive(seed, "weighted order with replacement")
        self._drawable = np.flatnonzero(self._weights).astype(np.int64)
        self._ends = np.cumsum(self._weights[self._drawable])

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        place = random_floats(self._key, k) * self._ends[-1]
        # Rounding may carry a draw onto the very end.
        found = np.minimum(np.searchsorted(self._ends, place, side="right"), len(self._ends) - 1)
        return np.asarray(self._drawable[found], dtype=np.int64)

    def digest(self) -> str:
        """See :class:`Order`."""
        return digest_of("weighted with replacement", self._seed, self.epoch_size, self._weights)


def log_weights(weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The logarithms of weights; minus infinity of 0.

    Raises:
        ValueError: A weight is negative or not finite, or all are 0.
    """
    check_weights(weights)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(weights.astype(np.float64)), dtype=np.float64)


def check_weights(weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The weights as float64, scaled to a largest of 1, if they are weights at all."""
    found = np.asarray(weights, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"expected one weight per sample, got the shape {found.shape}")
    bad = ~(np.isfinite(found) & (found >= 0))
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(f"sample {at} has the weight {found[at]}; weights are at least 0 and finite")
    if not found.any():
        raise ValueError(f"all {len(found)} weights are 0; at least one must be above")
    return np.asarray(found / found.max(), dtype=np.float64)
