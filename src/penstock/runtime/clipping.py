"""Gradient clipping by the global norm, over all stages of the pipeline, tied weights counted once."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock._core.meter import CONTROL, Meter
from penstock._core.sharded import here
from penstock.runtime.sharding.tensors import squared_norm


def global_norm(
    parameters: Iterable[nn.Parameter],
    *,
    group: dist.ProcessGroup | None = None,
    axes: Mapping[str, int] | None = None,
    meter: Meter | None = None,
) -> float:
    """The Euclidean norm of the gradients of all parameters on all ranks of ``group``, in float64.

    Args:
        parameters: This rank's share; a tied parameter belongs to one rank's share only.
        group: The ranks of one pipeline replica, or where layers are divided all ranks; None when this rank holds the
            whole model.
        axes: Of the group's ranks, how many lie along ``"data"`` and ``"model"``, if not one alone.
        meter: Where the bytes of the sum are counted.
    """
    total = squares(parameters, axes)
    work = reduced(total, group=group, meter=meter)
    if work is not None:
        work.wait()
    return float(total.sqrt())


def squares(parameters: Iterable[nn.Parameter], axes: Mapping[str, int] | None = None) -> Tensor:
    """The sum of squares of this rank's share of the gradients, a float64 scalar; see :func:`global_norm`."""
    total = torch.zeros((), dtype=torch.float64)
    for parameter in parameters:
        if parameter.grad is not None:
            total += squared_norm(parameter.grad, axes or {})
    return total


def reduced(total: Tensor, *, group: dist.ProcessGroup | None, meter: Meter | None = None) -> dist.Work | None:
    """Start to add ``total`` up over a group, in place; None where nothing is to be waited for."""
    if group is None or dist.get_world_size(group) == 1:
        return None
    if meter is not None:
        meter.all_reduce(CONTROL, total.element_size(), dist.get_world_size(group))
    work: dist.Work | None = dist.all_reduce(total, group=group, async_op=True)
    return work


def largest(parameters: Iterable[nn.Parameter]) -> float:
    """The largest absolute value in the gradients of this rank; NaN where there is one. 0 without gradients."""
    gradients = [here(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients, norm_type=torch.inf)) if gradients else 0.0


def clip_(parameters: Iterable[nn.Parameter], *, norm: float, max_norm: float) -> None:
    """Scale gradients in place by ``max_norm / norm`` if ``norm`` exceeds ``max_norm``.

    A norm that is not finite is left to the caller: scaling by it would turn every gradient into NaN or zero.
    """
    if norm <= max_norm:
        return
    scale = max_norm / norm
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
