"""No compression, behind the same interface."""

import torch
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField


class NoCompression(CompressionAlgorithm):
    """Sends every element unchanged: the yardstick for all others.

    A collective reduces in the tensor's own dtype. A stored payload is float32 (every float up to 32 bits fits it
    exactly); a float64 tensor is refused there, because nothing may be lost.
    """

    name = "none"
    linear = True
    lossless = True

    def payload_layout(self, numel: int) -> list[PayloadField]:
        """One field, ``values``."""
        return [PayloadField("values", torch.float32, (numel,))]

    def compress(self, tensor: Tensor) -> Payload:
        """Widen to float32."""
        if tensor.dtype == torch.float64:
            raise ValueError(
                "algorithm 'none' sends payloads as float32 and would lose bits of a float64 tensor; "
                "convert the tensor to float32 first, or reduce it with compressed_allreduce, which keeps float64"
            )
        return {"values": tensor.reshape(-1).float()}

    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        """Narrow back to the original dtype; exact."""
        return out.copy_(payload["values"].view(out.shape))
