"""Local-update methods in float64 on plain vectors, all replicas in one place; nothing here imports Penstock."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Average = Callable[[list[Array]], Array]


def mean(ways: list[Array]) -> Array:
    total: Array = sum(ways) / len(ways)
    return total


class SparseAverage:
    """SparseLoCo's exchange: the largest ``keep`` of each chunk, each a sign and one of two means, by all-gather."""

    def __init__(self, numel: int, ranks: int, *, chunk: int, keep: int, beta: float) -> None:
        self.errors = [np.zeros(numel) for _ in range(ranks)]
        self.chunk, self.keep, self.beta = chunk, keep, beta

    def sent(self, y: Array) -> Array:
        result = np.zeros_like(y)
        for start in range(0, len(y), self.chunk):
            part = y[start : start + self.chunk]
            places = np.argsort(-np.abs(part), kind="stable")[: self.keep]
            sizes = np.abs(part[places])
            large = sizes > sizes.mean()
            size = np.where(large, sizes[large].mean() if large.any() else 0.0, sizes[~large].mean())
            result[start + places] = np.sign(part[places]) * np.float32(size)
        return result

    def __call__(self, ways: list[Array]) -> Array:
        total = np.zeros_like(ways[0])
        for rank, way in enumerate(ways):
            y = self.beta * self.errors[rank] + way
            sent = self.sent(y)
            self.errors[rank] = y - sent
            total += sent
        return total / len(ways)


class ReferenceLocal:
    """SGD inside, the outer step of DiLoCo's paper, fragments and delays of Streaming DiLoCo's."""

    def __init__(
        self,
        x: Array,
        ranks: int,
        *,
        lr: float,
        period: int,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        nesterov: bool = True,
        fragments: list[slice],
        overlap: int = 0,
        mixing: float = 0.0,
        averages: list[Average],
    ) -> None:
        self.x = [x.copy() for _ in range(ranks)]
        self.anchor, self.momentum = x.copy(), np.zeros_like(x)
        self.o: dict[str, Any] = dict(locals())
        self.flying: list[tuple[int, int, Array]] = []
        self.t = 0

    def step(self, gradients: list[Array]) -> None:
        o = self.o
        self.t += 1
        for x, g in zip(self.x, gradients, strict=True):
            x -= o["lr"] * g
        parts = o["fragments"]
        offsets = [p * o["period"] // len(parts) for p in range(len(parts))]
        self.land()
        for p, part in enumerate(parts):
            if self.t % o["period"] == offsets[p]:
                way = o["averages"][p]([self.anchor[part] - x[part] for x in self.x])
                self.flying.append((self.t + o["overlap"], p, way))
        self.land()

    def land(self) -> None:
        o = self.o
        for due, p, way in list(self.flying):
            if due == self.t:
                part = o["fragments"][p]
                self.momentum[part] = o["outer_momentum"] * self.momentum[part] + way
                ahead = way + o["outer_momentum"] * self.momentum[part] if o["nesterov"] else self.momentum[part]
                self.anchor[part] -= o["outer_lr"] * ahead
                for x in self.x:
                    x[part] = o["mixing"] * x[part] + (1 - o["mixing"]) * self.anchor[part]
                self.flying.remove((due, p, way))
