"""One all-reduce of an algorithm's values."""

from collections.abc import Iterator

from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.error_feedback import all_finite, compress_with_feedback
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.reductions.base import Launched, StagedReduction, Wires


class LinearReduction(StagedReduction):
    """One all-reduce in the algorithm's wire dtype.

    What the sum itself loses by rounding is not fed back. A result with a NaN or infinity counts as not made: the
    memory goes back to what it was, up to rounding (with EF21 it is never touched).

    Args:
        tensor: Flat and contiguous; holds the result after :meth:`wait`.
        algorithm: A linear one.
        wires: The ranks to sum over.
        memory: What the values lose is kept in its ``worker``; None lets it go.
        factor: Multiplied in before the cast, so that an average does not overflow on the way.
        key: Which of several buffers this is, for random choices.
    """

    def __init__(
        self,
        tensor: Tensor,
        algorithm: CompressionAlgorithm,
        wires: Wires,
        *,
        memory: ErrorMemory | None = None,
        factor: float = 1.0,
        key: int = 0,
    ) -> None:
        super().__init__(wires)
        self._tensor = tensor
        self._algorithm = algorithm
        self._memory = None if algorithm.lossless else memory
        self._factor = factor
        self._key = key

    def _stages(self, step: int) -> Iterator[Launched]:
        tensor, memory = self._tensor, self._memory
        if self._factor != 1.0:
            tensor.mul_(self._factor)
        if self._algorithm.lossless:
            yield self._wires.all_reduce(tensor, "all-reduce over replicas")
            return
        algorithm = self._algorithm.keyed(step, self._key)  # the same on all ranks: so values can be summed
        if memory is None:
            payload = algorithm.compress(tensor)
        else:
            if memory.rule.resets_at(step):
                memory.worker.zero_()
            payload = compress_with_feedback(algorithm, tensor, memory.worker, memory.rule)
        values = payload["values"]
        mine = None if memory is None else values.clone()
        yield self._wires.all_reduce(values, "all-reduce over replicas")
        if memory is None or mine is None:
            algorithm.decompress(payload, tensor)
            return
        finite = all_finite(values)
        if finite and memory.result is None:
            algorithm.decompress(payload, tensor)
            return
        sent = algorithm.decompress({**payload, "values": mine}, memory.worker.new_empty(tensor.shape))
        if memory.result is not None:
            memory.accept_estimate(algorithm.decompress(payload, tensor), sent, finite=finite)
            return
        take_back(memory.worker, sent, tensor, memory)
        algorithm.decompress(payload, tensor)


def take_back(memory: Tensor, sent: Tensor, tensor: Tensor, rules: ErrorMemory) -> None:
    """Make a compression undone: ``memory + sent - tensor`` where all of it is finite.

    Args:
        memory: The memory after compression; updated in place.
        sent: What a receiver saw of the payload; overwritten.
        tensor: What was compressed.
        rules: Says how errors are carried over.
    """
    difference = sent.sub_(tensor).mul_(1.0 - rules.rule.decay).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    memory.add_(difference)
