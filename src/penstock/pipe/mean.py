"""The mean loss of a global batch, told to every rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.pipe.common_sum import CommonSum


class PendingMean:
    """A mean over all ranks under way: losses, their number, and what a caller tallies.

    It starts after a rank's last forward pass and not with its first action: an operation that waits in the background
    counts against its group's time limit.

    Args:
        losses: Scalars of this rank; empty on ranks without the last stage.
        tally: At most two numbers to add up over all ranks, as many on each.
        step: Optimizer step.
        training: Whether this rank trains or evaluates.
        group: All ranks, on gloo; None for a world of one.
        watcher: Told of the wait.
        meter: Counts the bytes (``control``) and the wait (``wait_loss``).
    """

    def __init__(
        self,
        losses: Sequence[Tensor],
        tally: Sequence[float],
        *,
        step: int,
        training: bool,
        group: dist.ProcessGroup | None,
        watcher: Watcher,
        meter: Meter,
    ) -> None:
        total = torch.stack(list(losses)).double().sum().item() if losses else 0.0
        self._sum = CommonSum(
            [total, len(losses), *tally],
            "mean loss",
            step=step,
            training=training,
            group=group,
            watcher=watcher,
            meter=meter,
        )

    def wait(self) -> tuple[float, tuple[float, ...]]:
        """The mean loss and the sums of tallies.

        Raises:
            ValueError: Not all ranks train, or evaluate, at this step.
        """
        losses, count, *tally = self._sum.wait()
        return losses / count, tuple(tally)
