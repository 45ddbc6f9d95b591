"""Which reduction fits an algorithm and a group.

A reduction goes ``start``, ``advance`` (once or more), ``wait``. ``start`` and ``advance`` launch a collective without
waiting for it, so several reductions can be in flight; every rank must call them in the same order. All buffers of a
bucket, scales and bits, travel in one collective.

==============================================  =========================================================
algorithm                                       exchange
==============================================  =========================================================
linear (``none``, ``fp16``, ``bf16``,           one all-reduce of the values
``randomk``)
``powersgd``                                    two all-reduces, of the left and of the right factors
sparse or shaped (``topk``, ``topk_int2``,      one all-gather of all payloads
``dct_topk``)
any other                                       two phases: all-to-all of chunks, all-gather of their sums
==============================================  =========================================================
"""

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.algorithms.none import NoCompression
from penstock.compression.algorithms.powersgd import PowerSGD
from penstock.compression.chunks import Part
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.group import rank_in, ranks_of
from penstock.compression.reductions import (
    GatherReduction,
    HierarchicalReduction,
    LinearReduction,
    LocalReduction,
    LowRankReduction,
    Reduction,
    TwoPhaseReduction,
    Wires,
)

__all__ = ["LocalReduction", "Reduction", "finish_all", "make_reduction"]


def make_reduction(
    tensor: Tensor,
    algorithm: CompressionAlgorithm | None,
    group: dist.ProcessGroup | None,
    *,
    memory: ErrorMemory | None = None,
    parts: Sequence[Part] = (),
    inside: dist.ProcessGroup | None = None,
    factor: float = 1.0,
    key: int = 0,
    meter: Meter | None = None,
    watcher: Watcher | None = None,
) -> Reduction:
    """The reduction that fits an algorithm and a group.

    Args:
        tensor: Flat and contiguous; float32 or float64 unless the algorithm is linear. Holds the result afterwards.
        algorithm: None for no compression.
        group: The ranks to sum over; with ``inside``, the ranks of the other machines that have this one's place.
        memory: Error memories, from :meth:`ErrorMemory.for_tensor` with the same arguments; None lets errors go.
        parts: Where the parameters lie in the tensor; needed by algorithms that are ``shaped``.
        inside: The ranks of this machine, summed over in full precision; None where all ranks are alike.
        factor: Multiplied into the sum.
        key: Which of several buffers this is, for random choices.
        meter: Counts the bytes as ``replicas``.
        watcher: Bounds the waits.

    Raises:
        ValueError: A ``shaped`` algorithm without parts, or with ``inside``; or memories of another tensor.
    """
    if inside is not None and ranks_of(inside) > 1 and tensor.numel():
        if algorithm is not None and algorithm.shaped:
            raise ValueError(
                f"{algorithm.name} compresses whole matrices, but a hierarchical exchange cuts them into shards; "
                "take another algorithm, or turn hierarchical off"
            )
        return HierarchicalReduction(
            tensor,
            Wires(inside, meter=meter, watcher=watcher),
            lambda shard: make_reduction(shard, algorithm, group, memory=memory, key=key, meter=meter, watcher=watcher),
            factor=factor,
        )
    if ranks_of(group) == 1 or tensor.numel() == 0:
        return LocalReduction()
    wires = Wires(group, meter=meter, watcher=watcher)
    if algorithm is None:
        return LinearReduction(tensor, NoCompression(), wires, factor=factor)
    if memory is not None:
        algorithm.check_feedback()
        memory.check(tensor.numel(), ranks=ranks_of(group), rank=rank_in(group))
    if algorithm.shaped and not parts:
        raise ValueError(
            f"{algorithm.name} compresses matrices, but this exchange knows a flat buffer only; take another "
            "algorithm, or say where the parameters lie in it (parts)"
        )
    if algorithm.linear:
        return LinearReduction(tensor, algorithm, wires, memory=memory, factor=factor, key=key)
    if isinstance(algorithm, PowerSGD):
        return LowRankReduction(tensor, algorithm, wires, parts=parts, memory=memory, factor=factor)
    if algorithm.sparse or algorithm.shaped:
        pieces = parts if algorithm.shaped else [Part(0, (tensor.numel(),))]
        return GatherReduction(tensor, algorithm, wires, parts=pieces, memory=memory, factor=factor, key=key)
    return TwoPhaseReduction(tensor, algorithm, wires, memory=memory, factor=factor, key=key)


def finish_all(reductions: Iterable[Reduction]) -> None:
    """Take reductions that have started to their ends, in turn: each waits while the collectives of the others run."""
    going = list(reductions)
    while going:
        going = [reduction for reduction in going if reduction.advance()]
