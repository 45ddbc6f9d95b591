"""``torch.amp.GradScaler`` around optimizers whose replicas step together, while each scales its own loss.

A GradScaler leaves out the steps of an optimizer whose gradients overflowed *here*. Replicas with gradients of their
own do not overflow together: one would leave out a step in which the others wait for it. A GradScaler calls an
optimizer with ``_step_supports_amp_scaling`` at every step, and says by the attributes ``found_inf`` and ``grad_scale``
what it found and what the gradients are still multiplied by (None where they are not).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.reductions import Wires


def gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """What the gradients are still multiplied by, ``[]``; None where they are as they should be."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return scale


def overflowed(
    optimizer: Optimizer,
    group: dist.ProcessGroup | None,
    *,
    alone: bool,
    meter: Meter | None = None,
    watcher: Watcher | None = None,
) -> bool:
    """Whether a GradScaler found a NaN or infinity in some replica's gradients; collective where one calls the step.

    Args:
        optimizer: With ``_step_supports_amp_scaling``.
        group: The replicas; None is the default group.
        alone: There is but this one, whatever the group.
        meter: Counts the 4 bytes.
        watcher: Bounds the wait.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    total = found.detach().to(torch.float32, copy=True)  # what was given is the scaler's
    if not alone:
        wires = Wires(group, meter=meter, watcher=watcher)
        wires.wait(wires.all_reduce(total, "whether a gradient overflowed on some replica"))
    return bool(total)
