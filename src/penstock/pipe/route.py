"""The ways that one direction of a pipeline takes."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.pipe.connections import Connections
from penstock.pipe.incoming import Incoming
from penstock.pipe.outgoing import Outgoing


class Route(NamedTuple):
    """Connections, a group, and where tensors are.

    Attributes:
        direction: ``"F"`` or ``"B"``.
        connections: For frames.
        ranks: For each pipeline rank, its rank in the world.
        payload: For tensors on ``device``; None sends them inside the frames.
        device: Where payloads live.
    """

    direction: str
    connections: Connections
    ranks: tuple[int, ...]
    payload: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")

    def outgoing(self, pipe_rank: int) -> Outgoing:
        """The connection to a pipeline rank."""
        return self.connections.outgoing(self.ranks[pipe_rank], self.direction)

    def incoming(self, pipe_rank: int) -> Incoming:
        """The connection from a pipeline rank."""
        return self.connections.incoming(self.ranks[pipe_rank], self.direction)

    def empty_payload(self, nbytes: int) -> Tensor | None:
        """Memory for a payload; None for one of no bytes."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device) if nbytes else None
