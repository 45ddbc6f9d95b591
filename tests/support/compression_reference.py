"""Plain float64 references written from the papers, with loops and no buffers; nothing here imports Penstock."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def sent_by_onebit(y: Array, block: int = 1024, scale: str = "l1") -> Array:
    """What a receiver sees of ``y``: per block, the sign bit times the mean magnitude, rounded to float32."""
    sent = np.empty_like(y)
    for start in range(0, len(y), block):
        part = y[start : start + block]
        s = np.mean(np.abs(part)) if scale == "l1" else np.sqrt(np.mean(part**2))
        sent[start : start + block] = np.where(np.signbit(part), -1.0, 1.0) * np.float64(np.float32(s))
    return sent


def bounds(numel: int, ranks: int) -> list[tuple[int, int]]:
    size = (numel + ranks - 1) // ranks
    size = (size + 63) // 64 * 64
    return [(min(r * size, numel), min(r * size + size, numel)) for r in range(ranks)]


class ReferenceAverage:
    """The two-phase compressed average with errors fed back on both sides, all ranks in one place."""

    def __init__(self, numel: int, ranks: int, block: int = 1024) -> None:
        self.bounds = bounds(numel, ranks)
        self.block = block
        self.worker = [np.zeros(numel) for _ in range(ranks)]
        self.server = [np.zeros(stop - start) for start, stop in self.bounds]

    def __call__(self, xs: list[Array]) -> Array:
        ranks = len(xs)
        result = np.empty_like(xs[0])
        for owner, (start, stop) in enumerate(self.bounds):
            total = np.zeros(stop - start)
            for rank in range(ranks):
                y = xs[rank][start:stop] + self.worker[rank][start:stop]
                sent = sent_by_onebit(y, self.block)
                self.worker[rank][start:stop] = y - sent
                total += sent
            y = total / ranks + self.server[owner]
            sent = sent_by_onebit(y, self.block)
            self.server[owner] = y - sent
            result[start:stop] = sent
        return result


class ReferenceOneBitAdam:
    """Algorithm 1 of the 1-bit Adam paper with Adam's bias corrections and decoupled weight decay, on one vector."""

    def __init__(
        self,
        x: Array,
        ranks: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        freeze_step: int,
        bias_correction: bool,
        variance_floor: float,
    ) -> None:
        self.x = x.copy()
        self.m = np.zeros_like(x)
        self.v = np.zeros_like(x)
        self.t = 0
        self.average = ReferenceAverage(len(x), ranks)
        self.options: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "freeze_step": freeze_step,
            "bias_correction": bias_correction,
            "variance_floor": variance_floor,
        }

    def step(self, gradients: list[Array]) -> None:
        o = self.options
        (b1, b2), T = o["betas"], o["freeze_step"]
        self.t += 1
        if self.t <= T:
            g = sum(gradients) / len(gradients)
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g**2
            deviation = np.sqrt(self.v)
        else:
            self.m = self.average([b1 * self.m + (1 - b1) * g for g in gradients])
            deviation = np.sqrt(self.v)
            for start in range(0, len(deviation), 1024):
                block = deviation[start : start + 1024]
                block[:] = np.maximum(block, o["variance_floor"] * block.mean())
        c1 = 1 - b1**self.t if o["bias_correction"] else 1.0
        c2 = 1 - b2 ** min(self.t, T) if o["bias_correction"] else 1.0
        denominator = deviation / np.sqrt(c2) + o["eps"]
        if self.t > T:
            denominator[deviation == 0] = np.inf
        self.x = self.x * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * (self.m / c1) / denominator
