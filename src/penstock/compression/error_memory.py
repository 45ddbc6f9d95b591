"""What one rank owes to the others in a two-phase reduction."""

from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.compression.chunks import chunk_bounds
from penstock.compression.error_feedback import memory_dtype
from penstock.compression.group import rank_in, ranks_of


class ErrorMemory:
    """The two memories of one flat buffer; they are used and updated in place.

    Attributes:
        worker: What this rank did not send of its own contribution, ``[numel]``.
        server: What this rank did not send of the sum that it makes for its chunk, ``[chunk]``.
    """

    def __init__(self, worker: Tensor, server: Tensor) -> None:
        self.worker = worker
        self.server = server

    @classmethod
    def for_tensor(cls, tensor: Tensor, group: dist.ProcessGroup | None = None) -> Self:
        """Empty memories for reducing ``tensor`` over ``group`` (None: the default group)."""
        start, stop = chunk_bounds(tensor.numel(), ranks_of(group))[rank_in(group)]
        dtype = memory_dtype(tensor.dtype)
        return cls(
            torch.zeros(tensor.numel(), dtype=dtype, device=tensor.device),
            torch.zeros(stop - start, dtype=dtype, device=tensor.device),
        )

    def check(self, numel: int, *, ranks: int, rank: int) -> None:
        """Raise ``ValueError`` unless the memories fit a buffer of ``numel`` elements on this rank."""
        start, stop = chunk_bounds(numel, ranks)[rank]
        if self.worker.numel() != numel or self.server.numel() != stop - start:
            raise ValueError(
                f"the error memory is for {self.worker.numel()} elements with a chunk of {self.server.numel()}, but "
                f"the tensor has {numel} and rank {rank} of {ranks} sums {stop - start}; make one with "
                "ErrorMemory.for_tensor(tensor, group) and keep it for this tensor alone"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Both memories by name, for a state dict; not copies."""
        return {"worker": self.worker, "server": self.server}
