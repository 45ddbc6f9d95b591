"""The mean loss of a global batch, told to every rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import CONTROL, Meter
from penstock._core.waiting import Watcher


class PendingMean:
    """A sum over all ranks under way: losses, their number, and a tally.

    It starts after a rank's last action and not with its first: an operation that waits in the background counts
    against its group's time limit. Sums are in float64, over one buffer, so every rank is told the same bits.

    Args:
        losses: Scalars of this rank; empty on ranks without the last stage.
        tally: A number to add up over all ranks.
        group: All ranks, on gloo; None for a world of one.
        watcher: Told of the wait.
        meter: Counts the bytes (``control``) and the wait (``wait_loss``).
    """

    def __init__(
        self, losses: Sequence[Tensor], tally: float, *, group: dist.ProcessGroup | None, watcher: Watcher, meter: Meter
    ) -> None:
        self._watcher = watcher
        self._meter = meter
        self._total = torch.zeros(3, dtype=torch.float64)
        self._total[2] = tally
        if losses:
            self._total[0] = torch.stack(list(losses)).double().sum()
            self._total[1] = len(losses)
        self._work: dist.Work | None = None
        if group is not None:
            meter.all_reduce(CONTROL, self._total.nbytes, dist.get_world_size(group))
            self._work = dist.all_reduce(self._total, group=group, async_op=True)

    def wait(self) -> tuple[float, float]:
        """The mean loss and the sum of tallies."""
        if self._work is not None:
            with self._meter.timed("wait_loss"), self._watcher.waiting("mean loss"):
                self._work.wait()
        return float(self._total[0] / self._total[1]), float(self._total[2])
