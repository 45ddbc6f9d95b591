"""Rounding each element to a shorter float."""

from typing import ClassVar

import torch
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField


class Cast(CompressionAlgorithm):
    """Sends every element in :attr:`sent_as`."""

    linear = True
    sent_as: ClassVar[torch.dtype]

    def payload_layout(self, numel: int) -> list[PayloadField]:
        """One field, ``values``."""
        return [PayloadField("values", self.sent_as, (numel,))]

    def compress(self, tensor: Tensor) -> Payload:
        """Round to nearest even."""
        return {"values": tensor.detach().reshape(-1).to(self.sent_as)}

    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """Widen; exact."""
        return out.copy_(payload["values"].view(out.shape))
