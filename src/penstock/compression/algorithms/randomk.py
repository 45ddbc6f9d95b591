"""Elements chosen at random."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from penstock._core.keys import derive, random_words
from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField
from penstock.compression.algorithms._blocks import as_flat


class RandomK(CompressionAlgorithm):
    """One element of every ``every`` consecutive ones, chosen by a key that all ranks share.

    Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", NeurIPS 2018. Because all ranks choose the same places, no
    places are sent and one plain all-reduce of the chosen values sums them.

    Args:
        every: One element in so many is sent.
        scaled: Multiply by ``every``: unbiased, for use *without* error feedback. Otherwise a contraction, for use
            with it.
        seed: Of the choice.
    """

    name = "randomk"
    linear = True

    def __init__(self, *, every: int = 32, scaled: bool = False, seed: int = 0) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or not 1 <= every < 1 << 31:
            raise ValueError(f"every must be a whole number from 1 to {(1 << 31) - 1}, got {every!r}")
        if not isinstance(scaled, bool):
            raise ValueError(f"scaled must be true or false, got {scaled!r}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        self.every = every
        self.scaled = scaled
        self.seed = seed
        self._key = derive("randomk", seed)

    @property
    def random(self) -> bool:
        """Always."""
        return True

    @property
    def unbiased(self) -> bool:
        """With ``scaled``."""
        return self.scaled

    def keyed(self, *parts: int | str) -> Self:
        """The same with another choice."""
        other = type(self)(**self.options())
        other._key = derive("randomk", self.seed, *parts)
        return other

    def check_feedback(self) -> None:
        """Refuse ``scaled``: what is sent would be ``every`` times what leaves the memory."""
        if self.scaled:
            raise ValueError(
                f"randomk with scaled=True multiplies by {self.every}, and an error memory would grow with it; "
                "set scaled: false to keep error feedback, or error_feedback: false to stay unbiased"
            )

    def payload_layout(self, numel: int) -> list[PayloadField]:
        """``values`` float32 ``[ceil(numel / every)]`` and ``key`` int64 ``[1]``."""
        return [
            PayloadField("values", torch.float32, (-(-numel // self.every),)),
            PayloadField("key", torch.int64, (1,)),
        ]

    def contraction(self, shape: Sequence[int] | int) -> float | None:
        """``1 / every`` on average over the keys; None with ``scaled``."""
        return None if self.scaled else (1 - 1e-9) / self.every

    def compress(self, tensor: Tensor) -> Payload:
        """The chosen elements; a NaN or infinity anywhere makes the first of them NaN, so that it is noticed."""
        flat = as_flat(tensor)
        key = torch.tensor([self._key - (1 << 63)], dtype=torch.int64, device=flat.device)
        if not flat.numel():
            return {"values": flat.float(), "key": key}
        places, factors = self._choice(self._key, flat)
        values = (flat[places] * factors).float()
        values[:1] += torch.where(torch.isfinite(flat).all(), 0.0, torch.nan)
        return {"values": values, "key": key}

    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """Zeros but for the chosen elements."""
        out.zero_()
        flat = out.view(-1)
        if flat.numel():
            places, _ = self._choice(int(payload["key"]) + (1 << 63), flat)
            flat[places] = payload["values"].to(flat.dtype)
        return out

    def _choice(self, key: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the chosen elements and what they are multiplied by."""
        numel = like.numel()
        groups = np.arange(-(-numel // self.every), dtype=np.int64)
        lengths = np.minimum(self.every, numel - groups * self.every)
        # The top 32 bits of a random word times the length, shifted down: no remainder, hardly any bias.
        words = (random_words(key, groups) >> np.uint64(32)).astype(np.int64)
        places = groups * self.every + (words * lengths >> 32)
        factors = lengths if self.scaled else np.ones_like(lengths)
        return torch.from_numpy(places).to(like.device), torch.from_numpy(factors).to(like.device, like.dtype)
