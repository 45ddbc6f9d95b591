"""0/1 Adam and 1-bit LAMB in float64, written from the papers on plain vectors; nothing here imports Penstock."""

from typing import Any

import numpy as np
import numpy.typing as npt

from support.compression_reference import ReferenceAverage

Array = npt.NDArray[np.float64]


def floored(variance: Array, floor: float) -> Array:
    """The deviation, raised to ``floor`` times its mean over blocks of 1,024."""
    deviation = np.sqrt(variance)
    for start in range(0, len(deviation), 1024):
        block = deviation[start : start + 1024]
        block[:] = np.maximum(block, floor * block.mean())
    return deviation


class ReferenceZeroOneAdam:
    """Algorithm 1 of the 0/1 Adam paper: every replica has its own x, m and u between two exchanges."""

    def __init__(
        self,
        x: Array,
        ranks: int,
        *,
        lr: Any,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        variance_steps: set[int],
        exchange_steps: set[int],
        bias_correction: bool,
        variance_floor: float,
    ) -> None:
        self.x = [x.copy() for _ in range(ranks)]
        self.common = x.copy()
        self.m = [np.zeros_like(x) for _ in range(ranks)]
        self.v = np.zeros_like(x)
        self.u = [np.zeros_like(x) for _ in range(ranks)]
        self.rates = 0.0
        self.t = 0
        self.updates = 0
        self.average = ReferenceAverage(len(x), ranks)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.variance_steps, self.exchange_steps = variance_steps, exchange_steps
        self.bias_correction, self.variance_floor = bias_correction, variance_floor

    def step(self, gradients: list[Array]) -> None:
        self.t += 1
        (b1, b2), ranks = self.betas, range(len(gradients))
        lr = self.lr(self.t)
        rate = lr / (1 - b1**self.t) if self.bias_correction else lr
        keep = 1 - lr * self.weight_decay
        if self.t in self.variance_steps:
            assert self.rates == 0.0
            g = sum(gradients) / len(gradients)
            self.v = b2 * self.v + (1 - b2) * g**2
            self.updates += 1
            m = b1 * self.m[0] + (1 - b1) * g
            correction = np.sqrt(1 - b2**self.updates) if self.bias_correction else 1.0
            self.common = keep * self.common - rate * m / (np.sqrt(self.v) / correction + self.eps)
            self.x, self.m = [self.common.copy() for _ in ranks], [m.copy() for _ in ranks]
            return
        correction = np.sqrt(1 - b2**self.updates) if self.bias_correction else 1.0
        d = floored(self.v, self.variance_floor) / correction + self.eps
        for i in ranks:
            self.m[i] = b1 * self.m[i] + (1 - b1) * gradients[i]
            self.x[i] = keep * self.x[i] - rate * self.m[i] / d
            self.u[i] = keep * self.u[i] + rate * self.m[i]
        self.rates = keep * self.rates + rate
        self.common = keep * self.common
        if self.t in self.exchange_steps:
            if self.rates:
                u = self.average(self.u)
                momentum = u / self.rates
            else:  # nothing has moved, and the paper's momentum would be 0 / 0: the replicas' own are averaged
                u = np.zeros_like(d)
                momentum = sum(self.m) / len(self.m)
            self.common = self.common - u / d
            self.x = [self.common.copy() for _ in ranks]
            self.m = [momentum for _ in ranks]
            self.u = [np.zeros_like(u) for _ in ranks]
            self.rates = 0.0


class ReferenceLamb:
    """LAMB, then Algorithm 1 of the 1-bit LAMB paper, on layers that lie end to end in one compressed buffer."""

    def __init__(
        self,
        layers: list[Array],
        ranks: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        freeze_step: int,
        max_coeff: float,
        min_coeff: float,
        coeff_beta: float,
        factor_max: float,
        factor_min: float,
        factor_threshold: float,
        bias_correction: bool,
        variance_floor: float,
    ) -> None:
        self.layers = [x.copy() for x in layers]
        self.ends = np.cumsum([len(x) for x in layers])[:-1]
        numel = sum(len(x) for x in layers)
        self.m, self.v, self.fresh = np.zeros(numel), np.zeros(numel), np.zeros(numel)
        self.c = [0.0] * len(layers)
        self.r = [1.0] * len(layers)
        self.scale = np.ones(numel)
        self.t = 0
        self.average = ReferenceAverage(numel, ranks)
        self.o: dict[str, Any] = dict(locals())

    def step(self, gradients: list[Array]) -> None:
        o, (b1, b2), T = self.o, self.o["betas"], self.o["freeze_step"]
        self.t += 1
        c1 = 1 - b1**self.t if o["bias_correction"] else 1.0
        c2 = 1 - b2 ** min(self.t, T) if o["bias_correction"] else 1.0
        c2_fresh = 1 - b2**self.t if o["bias_correction"] else 1.0
        if self.t <= T:
            g = sum(gradients) / len(gradients)
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g**2
            moments = (np.split(a, self.ends) for a in (self.m, self.v))
            for i, (x, m, v) in enumerate(zip(self.layers, *moments, strict=True)):
                update = m / c1 / (np.sqrt(v / c2) + o["eps"]) + o["weight_decay"] * x
                ratio = np.linalg.norm(x) / np.linalg.norm(update)
                coeff = float(np.clip(ratio, o["min_coeff"], o["max_coeff"]))
                self.c[i] = o["coeff_beta"] * self.c[i] + (1 - o["coeff_beta"]) * coeff
                self.layers[i] = x - o["lr"] * coeff * update
            if self.t == T:
                self.fresh = self.v.copy()
                sizes = [np.sqrt(np.mean(m**2)) for m in np.split(self.m, self.ends)]
                united = np.mean(sizes)
                self.scale = np.concatenate(
                    [np.full(len(x), united / size) for x, size in zip(self.layers, sizes, strict=True)]
                )
            return
        before = self.m
        self.m = self.average([self.scale * (b1 * before + (1 - b1) * g) for g in gradients]) / self.scale
        told = (self.m - b1 * before) / (1 - b1)
        self.fresh = b2 * self.fresh + (1 - b2) * told**2
        frozen = floored(self.v, o["variance_floor"]) / np.sqrt(c2) + o["eps"]
        fresh = floored(self.fresh, o["variance_floor"]) / np.sqrt(c2_fresh) + o["eps"]
        parts = (np.split(a, self.ends) for a in (self.m, frozen, fresh))
        for i, (x, m, d, d_fresh) in enumerate(zip(self.layers, *parts, strict=True)):
            adams = m / c1 / d
            update = adams + o["weight_decay"] * x
            factor = np.max(d / d_fresh)
            if o["weight_decay"] > 0:
                share = min(1.0, np.linalg.norm(adams) / np.linalg.norm(update))
                factor = factor * share + 1 - share
            factor = np.clip(factor, o["factor_min"], o["factor_max"])
            low, high = (self.r[i] * (1 + sign * o["factor_threshold"]) for sign in (-1, 1))
            self.r[i] = float(np.clip(factor, low, high))
            self.layers[i] = x - o["lr"] * self.c[i] * self.r[i] * update
