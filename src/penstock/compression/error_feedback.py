"""What was not sent this time is sent later: one memory for every algorithm.

Stich and Karimireddy, "The error-feedback framework: better rates for SGD with delayed gradients and compressed
updates", JMLR 2020. With ``y = x + memory``, a compressor sends ``C(y)`` and the memory becomes ``y - C(y)``; so the
sum of everything sent, plus the memory, is the sum of everything that came in.
"""

import torch
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm, Payload


class ErrorFeedback:
    """An algorithm with the memory of one tensor.

    A NaN or infinity never enters the memory: it is sent (so the receiver sees it) and the memory of the elements
    that it spoilt starts again from zero.

    Args:
        algorithm: Any algorithm.
        memory: Flat float32 or float64 tensor, used in place; zeros to begin with.

    Attributes:
        memory: What is owed to the receiver.
    """

    def __init__(self, algorithm: CompressionAlgorithm, memory: Tensor) -> None:
        self.algorithm = algorithm
        self.memory = memory

    @classmethod
    def for_tensor(cls, algorithm: CompressionAlgorithm, tensor: Tensor) -> "ErrorFeedback":
        """With an empty memory that fits ``tensor``."""
        memory = torch.zeros(tensor.numel(), dtype=memory_dtype(tensor.dtype), device=tensor.device)
        return cls(algorithm, memory)

    def compress(self, tensor: Tensor) -> Payload:
        """Compress ``tensor`` plus the memory, and keep in the memory what is not sent; ``tensor`` is only read."""
        self.memory.add_(tensor.detach().reshape(-1))
        return self.algorithm.compress_residual_(self.memory)


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the error memory for a tensor: float32, or float64 where the tensor has it."""
    return torch.float64 if dtype == torch.float64 else torch.float32
