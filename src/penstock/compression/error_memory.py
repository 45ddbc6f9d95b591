"""What one rank owes to the others, or knows of them, in a compressed reduction."""

from collections.abc import Mapping, Sequence
from typing import Final, Self

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.algorithms.powersgd import PowerSGD
from penstock.compression.chunks import Part, chunk_bounds
from penstock.compression.error_feedback import CLASSIC, FeedbackRule, memory_dtype
from penstock.compression.group import rank_in, ranks_of

_START: Final = "start_"


class ErrorMemory:
    """The memories of one flat buffer; they are used and updated in place.

    Args:
        worker: See below.
        server: See below.
        rule: How errors are carried over.
        result: With EF21, the estimate of the result that all ranks share, ``[numel]``; where a payload goes to all
            ranks, the sum of what they know of each other's contributions.
        starts: Where PowerSGD's iterations start, one for each matrix.
        two_phases: Whether the exchange sums chunks, so that there is something to owe for them.
        divided: Whether the exchange makes a sum an average by dividing what it compresses, not what it has summed.
        start: Where in the buffer the elements lie that the memories are of: with a hierarchical reduction, the shard.
        chunk_start: Where in those the chunk starts that this rank sums.

    Attributes:
        worker: What this rank did not send of its own contribution, ``[numel]``; with EF21, what the others know of it.
        server: What this rank did not send of the sum that it makes for its chunk, ``[chunk]``; with EF21, the sum of
            what it knows of the contributions. Empty where an exchange has no such sum.
        result: See above.
    """

    def __init__(
        self,
        worker: Tensor,
        server: Tensor,
        *,
        rule: FeedbackRule = CLASSIC,
        result: Tensor | None = None,
        starts: Sequence[Tensor] = (),
        two_phases: bool = True,
        divided: bool = False,
        start: int = 0,
        chunk_start: int = 0,
    ) -> None:
        self.worker = worker
        self.server = server
        self.rule = rule
        self.result = result
        self.starts = list(starts)
        self.two_phases = two_phases
        self.divided = divided
        self.chunk_start = chunk_start
        self._start = start

    @classmethod
    def for_tensor(
        cls,
        tensor: Tensor,
        group: dist.ProcessGroup | None = None,
        *,
        algorithm: CompressionAlgorithm | None = None,
        rule: FeedbackRule = CLASSIC,
        parts: Sequence[Part] = (),
        inside: dist.ProcessGroup | None = None,
    ) -> Self:
        """Empty memories for reducing ``tensor`` over ``group`` (None: the default group).

        Args:
            tensor: The flat buffer.
            group: The ranks to reduce over.
            algorithm: Saves the memory that its exchange has no use for; None for all that any algorithm may need.
            rule: How errors are carried over.
            parts: Where the parameters lie in the buffer.
            inside: With a hierarchical reduction, the ranks of one machine: the memories are of this rank's shard.

        Raises:
            ValueError: The algorithm and error feedback do not go together.
        """
        if algorithm is not None:
            rule.check_sum(algorithm)
        first, last = 0, tensor.numel()
        if inside is not None and ranks_of(inside) > 1:
            first, last = chunk_bounds(last, ranks_of(inside))[rank_in(inside)]
        numel = last - first
        start, stop = chunk_bounds(numel, ranks_of(group))[rank_in(group)]
        two_phases = algorithm is None or not (algorithm.linear or algorithm.sparse or algorithm.shaped)

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=memory_dtype(tensor.dtype), device=tensor.device)

        starts = []
        if isinstance(algorithm, PowerSGD):
            drawn = [algorithm.start(part.shape, tensor.device) for part in parts]
            starts = [directions for directions in drawn if directions is not None]
        return cls(
            zeros(numel),
            zeros(stop - start if two_phases else 0),
            rule=rule,
            result=zeros(numel) if rule.kind == "ef21" else None,
            starts=starts,
            two_phases=two_phases,
            divided=algorithm is not None and (algorithm.linear or isinstance(algorithm, PowerSGD)),
            start=first,
            chunk_start=start,
        )

    def cut_off(self, mask: Tensor) -> None:
        """Owe nothing where ``mask``, ``[numel of the whole buffer]``, is 0."""
        mine = mask[self._start : self._start + self.worker.numel()]
        self.worker.mul_(mine)
        self.server.mul_(mine[self.chunk_start : self.chunk_start + self.server.numel()])
        if self.result is not None:
            self.result.mul_(mine)

    def check(self, numel: int, *, ranks: int, rank: int) -> None:
        """Raise ``ValueError`` unless the memories fit a buffer of ``numel`` elements on this rank."""
        start, stop = chunk_bounds(numel, ranks)[rank]
        if self.worker.numel() != numel or self.server.numel() not in (0, stop - start):
            raise ValueError(
                f"the error memory is for {self.worker.numel()} elements with a chunk of {self.server.numel()}, but "
                f"the tensor has {numel} and rank {rank} of {ranks} sums {stop - start}; make one with "
                "ErrorMemory.for_tensor(tensor, group) and keep it for this tensor alone"
            )

    def accept_estimate(self, tensor: Tensor, sent: Tensor, *, finite: bool) -> None:
        """EF21: what was sent becomes part of the estimates.

        Args:
            tensor: What all ranks together sent, ``[numel]``; becomes the estimate of the result.
            sent: This rank's part of it.
            finite: Whether it is to be remembered.
        """
        assert self.result is not None  # only EF21 has estimates
        tensor.add_(self.result)
        if finite:
            self.result.copy_(tensor)
            self.worker.add_(sent)

    def tensors(self) -> dict[str, Tensor]:
        """All memories by name, for a state dict; not copies. Those that an exchange has no use for are left out."""
        named = {"worker": self.worker}
        if self.two_phases:
            named["server"] = self.server
        if self.result is not None:
            named["result"] = self.result
        named.update({f"{_START}{index:03d}": start for index, start in enumerate(self.starts)})
        return named


def empty_memories(named: Mapping[str, Tensor]) -> None:
    """Owe nothing: zeros in what :meth:`ErrorMemory.tensors` gave, under any prefix; where iterations start stays.

    (From zeros an iteration of PowerSGD would see nothing but the first rows of a matrix.)
    """
    for name, memory in named.items():
        if not name.rpartition(".")[2].startswith(_START):
            memory.zero_()
