"""One micro-batch as the engine receives it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one pipeline computes in one forward and backward pass.

    Attributes:
        inputs: The value for the first layer, any nest of tuples, lists, dicts, tensors and plain values. None on ranks
            without the first stage.
        targets: What the loss function compares with. None on ranks without the last stage.
        index: Index of the micro-batch in the *global* batch, over all replicas, from 0.
        positions: For each row, the sample's position in the run's global order; empty where unknown.
        weight: Share of this micro-batch's loss relative to its siblings'; 1.0 where all count alike.
    """

    inputs: Any
    targets: Any
    index: int
    positions: tuple[int, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ValueError(f"a micro-batch's index counts from 0 over the global batch, got {self.index}")
        if not self.weight >= 0:
            raise ValueError(f"micro-batch {self.index}: its weight must not be negative, got {self.weight}")
