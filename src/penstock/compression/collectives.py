"""An all-reduce that sends fewer bytes."""

import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.chunks import Part
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.group import rank_in, ranks_of
from penstock.compression.reduction import Reduction, make_reduction


class CompressedWork:
    """A compressed all-reduce in flight; every rank must wait for several of them in the same order."""

    def __init__(self, reduction: Reduction, flat: Tensor, tensor: Tensor) -> None:
        self._reduction: Reduction | None = reduction
        self._flat = flat
        self._tensor = tensor

    def wait(self) -> Tensor:
        """Finish; returns the reduced tensor. Waiting again returns it again."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
            if self._flat.data_ptr() != self._tensor.data_ptr():
                self._tensor.detach().copy_(self._flat.view(self._tensor.shape))
        return self._tensor


def compressed_allreduce(
    tensor: Tensor,
    algorithm: CompressionAlgorithm | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    worker_error: Tensor | None = None,
    server_error: Tensor | None = None,
    average: bool = True,
    step: int = 0,
    meter: Meter | None = None,
    watcher: Watcher | None = None,
) -> Tensor:
    """Sum or average a tensor over a group, in place; the result has the same bits on every rank.

    A linear algorithm (``none``, ``fp16``, ``bf16``, ``randomk``) is one all-reduce of its values; an average divides
    *before* the cast, so that fp16 does not overflow in the sum. Sparse payloads are gathered, ``powersgd``'s factors
    are all-reduced. Any other algorithm takes two phases: every rank compresses the part of its tensor that rank ``r``
    is to sum and sends it to rank ``r`` (all-to-all); the sums are compressed again and sent to all (all-gather). On
    one rank nothing is sent and the tensor stays as it is.

    Args:
        tensor: Floating, any shape and strides, the same number of elements on every rank.
        algorithm: None for no compression.
        group: None for the default group.
        worker_error: What this rank left out of its contributions so far, flat, ``[numel]``; updated in place. Make
            it and ``server_error`` with ``ErrorMemory.for_tensor(tensor, group)``. None lets the errors go.
        server_error: What this rank left out of the sums of its chunk; goes with ``worker_error``.
        average: Divide by the number of ranks.
        step: Keys random choices: count it up, or they repeat. The same on every rank.
        meter: Counts bytes and waiting seconds.
        watcher: Bounds the waits.

    Returns:
        ``tensor``.

    Raises:
        ValueError: The tensor is not floating, or the error memories fit another tensor or group.
    """
    return start_compressed_allreduce(
        tensor,
        algorithm,
        group=group,
        worker_error=worker_error,
        server_error=server_error,
        average=average,
        step=step,
        meter=meter,
        watcher=watcher,
    ).wait()


def start_compressed_allreduce(
    tensor: Tensor,
    algorithm: CompressionAlgorithm | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    worker_error: Tensor | None = None,
    server_error: Tensor | None = None,
    average: bool = True,
    step: int = 0,
    meter: Meter | None = None,
    watcher: Watcher | None = None,
) -> CompressedWork:
    """Launch :func:`compressed_allreduce` and return at once; ``wait()`` finishes it.

    The tensor must not be touched in between.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"only floating tensors are reduced compressed, got {tensor.dtype}; use dist.all_reduce")
    ranks = ranks_of(group)
    memory = None
    if worker_error is not None and server_error is not None:
        memory = ErrorMemory(worker_error, server_error)
        memory.check(tensor.numel(), ranks=ranks, rank=rank_in(group))
    elif worker_error is not None or server_error is not None:
        raise ValueError("worker_error and server_error go together: pass both, or neither to let the errors go")
    flat = tensor.detach().contiguous().view(-1)
    factor = 1.0 / ranks if average else 1.0
    reduction = make_reduction(
        flat,
        algorithm,
        group,
        memory=memory,
        parts=[Part(0, tuple(tensor.shape))],
        factor=factor,
        meter=meter,
        watcher=watcher,
    )
    reduction.start(step)
    return CompressedWork(reduction, flat, tensor)
