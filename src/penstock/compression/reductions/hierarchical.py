"""Full precision inside a machine, compressed between machines.

::

    start      reduce-scatter inside: each of a machine's ranks holds the machine's sum of one shard
    advance    the shard is reduced between machines, by the ranks that hold the same shard there, compressed
    last       all-gather inside: the same bits on every rank
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from penstock.compression.chunks import chunk_bounds
from penstock.compression.reductions.base import Launched, Reduction, StagedReduction, Wires


class HierarchicalReduction(StagedReduction):
    """A sum over machines and their ranks in which only one machine's worth of compressed bytes crosses the network.

    Args:
        tensor: Flat and contiguous; holds the result after :meth:`wait`.
        inside: The ranks of this machine, as many on every machine.
        between: Makes the reduction of this rank's shard between the machines.
        factor: Multiplied in between the two: ``1 / ranks`` for an average.
    """

    def __init__(
        self, tensor: Tensor, inside: Wires, between: Callable[[Tensor], Reduction], *, factor: float = 1.0
    ) -> None:
        super().__init__(inside)
        self._tensor = tensor
        self._factor = factor
        bounds = chunk_bounds(tensor.numel(), inside.ranks)
        size = bounds[0][1] - bounds[0][0]
        start, stop = bounds[inside.rank]
        self._padded = tensor.new_zeros(size * inside.ranks)
        self._shard = tensor.new_zeros(size)
        self._between = between(self._shard[: stop - start])

    def _stages(self, step: int) -> Iterator[Launched]:
        numel = self._tensor.numel()
        self._padded[:numel].copy_(self._tensor)
        yield self._wires.reduce_scatter(self._shard, self._padded, "reduce-scatter inside the machine")
        if self._factor != 1.0:
            self._shard.mul_(self._factor)
        if isinstance(self._between, StagedReduction):
            yield from self._between._stages(step)
        yield self._wires.all_gather(self._padded, self._shard, "all-gather inside the machine")
        self._tensor.copy_(self._padded[:numel])
