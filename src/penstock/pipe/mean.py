"""The mean loss of a global batch, told to every rank, once all ranks prove to be computing the same one."""

from collections.abc import Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.meter import CONTROL, Meter
from penstock._core.waiting import Watcher

_TALLIES: Final = 2
"""Room for tallies in every sum, so that those of ranks that do different things are of one size."""
_STEPS_TOLD_APART: Final = 1 << 15
"""Small enough for sums of squares over a million ranks to be exact."""


class PendingMean:
    """A sum over all ranks under way: losses, their number, and what a caller tallies.

    It starts after a rank's last forward pass and not with its first action: an operation that waits in the background
    counts against its group's time limit. Sums are in float64, over one buffer, so every rank is told the same bits.

    A rank that evaluates while others train, or is a step behind them, would mix its losses into theirs. So each rank
    adds a number for what it is doing, and its square: the numbers are equal if and only if the sum of squares times
    the number of ranks is the square of the sum.

    Args:
        losses: Scalars of this rank; empty on ranks without the last stage.
        tally: Numbers to add up over all ranks, as many on each.
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
        self._watcher = watcher
        self._meter = meter
        self._doing = f"{'train' if training else 'evaluat'}ing at step {step}"
        self._ranks = 1 if group is None else dist.get_world_size(group)
        number = 2 * (step % _STEPS_TOLD_APART) + training
        self._total = torch.tensor([0.0, len(losses), number, number * number, *tally], dtype=torch.float64)
        if losses:
            self._total[0] = torch.stack(list(losses)).double().sum()
        self._work: dist.Work | None = None
        if group is not None:
            meter.all_reduce(CONTROL, self._total.nbytes, self._ranks)
            self._work = dist.all_reduce(self._total, group=group, async_op=True)

    def wait(self) -> tuple[float, tuple[float, ...]]:
        """The mean loss and the sums of tallies.

        Raises:
            ValueError: Not all ranks train, or evaluate, at this step.
        """
        if self._work is not None:
            with self._meter.timed("wait_loss"), self._watcher.waiting("mean loss"):
                self._work.wait()
        losses, count, numbers, squares, *tally = self._total.tolist()
        if self._ranks * int(squares) != int(numbers) ** 2:
            raise ValueError(
                f"this rank is {self._doing}, but not all ranks are; "
                "every rank must call train_batch and eval_batch in the same order"
            )
        return losses / count, tuple(tally)
