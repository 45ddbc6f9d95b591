"""The process groups that one direction of a pipeline uses."""

from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# What is left of a long frame has a tag of its own: receives for the frames after it are posted already.
TAG_FRAME: Final = 0
TAG_REST: Final = 1
TAG_PAYLOAD: Final = 2


class Route(NamedTuple):
    """Groups, and where tensors are.

    Attributes:
        frames: For frames: gloo.
        payload: For tensors on ``device``; None sends them inside the frames.
        device: Where payloads live.
    """

    frames: dist.ProcessGroup
    payload: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")

    def empty_payload(self, nbytes: int) -> Tensor | None:
        """Memory for a payload; None for one of no bytes."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device) if nbytes else None
