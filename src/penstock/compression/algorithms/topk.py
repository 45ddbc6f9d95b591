"""The largest elements of each chunk."""

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from penstock.compression.algorithm import Payload, PayloadField
from penstock.compression.algorithms._sparse import TopKByChunk

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TopK(TopKByChunk):
    """The largest elements of each chunk with their places.

    Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", NeurIPS 2018, chunk by chunk.

    Args:
        chunk_size: Elements of a chunk, at most 65536; up to 256 a place takes 8 bits, up to 4096 12 bits, else 16.
        keep: Elements sent of a chunk.
        values: ``"fp32"`` or ``"bf16"``.
    """

    name = "topk"

    def __init__(self, *, chunk_size: int = 4096, keep: int = 64, values: Literal["fp32", "bf16"] = "fp32") -> None:
        super().__init__(chunk_size=chunk_size, keep=keep)
        if not isinstance(values, str) or values not in _DTYPES:
            raise ValueError(f"unknown values {values!r}; known: {', '.join(map(repr, _DTYPES))}")
        self.values: Literal["fp32", "bf16"] = values

    def payload_layout(self, numel: int) -> list[PayloadField]:
        """``values`` ``[sent]`` and ``places``, uint8."""
        return [
            PayloadField("values", _DTYPES[self.values], (self._sent(numel),)),
            self._places_field(numel),
        ]

    def contraction(self, shape: Sequence[int] | int) -> float:
        """``keep / chunk_size``: the largest have at least their share of the energy."""
        rounding = 2.0**-16 if self.values == "bf16" else 2.0**-48
        return self._kept_share(shape) * (1 - rounding)

    def _pack_values(self, values: Tensor) -> Payload:
        return {"values": values.to(_DTYPES[self.values])}

    def _unpack_values(self, payload: Payload, out: Tensor) -> None:
        out.copy_(payload["values"])
