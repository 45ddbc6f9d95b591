"""A part of the samples: so many of them, such a share, or those that a function picks."""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from penstock._core.keys import derive
from penstock.data_pipeline.data_sampling.order import IntArray, Order, digest_of
from penstock.data_pipeline.data_sampling.permutation import permute


class SubsetConfig(BaseModel):
    """Which samples a run may see at all; exactly one of the keys.

    Attributes:
        count: So many, chosen at random by the seed.
        percent: Such a share, above 0 and up to 100, chosen at random by the seed; at least one sample.
        predicate: Those for which this function of the sample is true.
        indices: Just these, without repeats.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int | None = Field(default=None, ge=1)
    percent: float | None = Field(default=None, gt=0, le=100)
    predicate: Callable[[Any], Any] | None = None
    indices: Any = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of count, percent, predicate and indices; got {given or 'none'}")
        return self


def subset_members(config: SubsetConfig, data: Any, seed: int) -> IntArray:
    """The numbers of the chosen samples, rising; int64.

    Raises:
        ValueError: There are not that many samples, none is picked, or an index is wrong.
    """
    size = len(data)
    if config.predicate is not None:
        picked = np.fromiter((bool(config.predicate(data[index])) for index in range(size)), dtype=bool, count=size)
        if not picked.any():
            raise ValueError(f"subset.predicate is true for none of {size} samples")
        return np.flatnonzero(picked).astype(np.int64)
    if config.indices is not None:
        return _checked(np.asarray(config.indices), size)
    count = config.count
    if config.percent is not None:
        count = max(1, round(size * config.percent / 100))
    assert count is not None
    if count > size:
        raise ValueError(f"subset.count={count}, but there are {size} samples; lower it")
    return np.sort(permute(np.arange(count, dtype=np.int64), size, derive(seed, "subset")))


def _checked(indices: npt.NDArray[Any], size: int) -> IntArray:
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
        raise ValueError(f"subset.indices: expected sample numbers, got {indices.dtype} of shape {indices.shape}")
    members = np.unique(indices).astype(np.int64)
    if len(members) < len(indices):
        raise ValueError(f"subset.indices: {len(indices) - len(members)} of {len(indices)} are repeats")
    if members[0] < 0 or members[-1] >= size:
        bad = int(members[0] if members[0] < 0 else members[-1])
        raise ValueError(f"subset.indices: sample {bad} does not exist; there are {size} samples")
    return members


class SubsetOrder:
    """An order over a subset, in the numbers of the whole.

    Args:
        inner: The order over ``0 .. len(members) - 1``.
        members: Which samples these are.
    """

    def __init__(self, inner: Order, members: IntArray) -> None:
        self.inner = inner
        self._members = members
        self.epoch_size = inner.epoch_size

    def __call__(self, k: IntArray) -> IntArray:
        """See :class:`Order`."""
        return np.asarray(self._members[self.inner(k)], dtype=np.int64)

    def digest(self) -> str:
        """See :class:`Order`."""
        return digest_of("subset", self.inner.digest(), self._members)
