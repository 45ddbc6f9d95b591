"""Sums of a few numbers over all ranks, once all of them prove to be doing the same thing."""

from collections.abc import Sequence
from typing import Final

import torch
import torch.distributed as dist

from penstock._core.meter import CONTROL, Meter
from penstock._core.waiting import Watcher

_MOST: Final = 4
"""Numbers in one sum. All sums are of this size, so that those of ranks that do different things meet unharmed."""
_STEPS_TOLD_APART: Final = 1 << 15
"""Small enough for sums of squares over a million ranks to be exact."""


class CommonSum:
    """A sum over all ranks under way.

    A rank that evaluates while others train, or is a step behind them, would mix its numbers into theirs. So each rank
    adds a number for what it is doing, and its square: the numbers are equal if and only if the sum of squares times
    the number of ranks is the square of the sum.

    Sums are in float64, over one buffer, so every rank is told the same bits.

    Args:
        numbers: What to add up, at most 4, as many on each rank; whole numbers are exact up to 2**53.
        name: Of the sum, for the wait.
        step: Optimizer step.
        training: Whether this rank trains or evaluates.
        group: All ranks, on gloo; None for a world of one.
        watcher: Told of the wait.
        meter: Counts the bytes (``control``) and the wait (``wait_loss``).
    """

    def __init__(
        self,
        numbers: Sequence[float],
        name: str,
        *,
        step: int,
        training: bool,
        group: dist.ProcessGroup | None,
        watcher: Watcher,
        meter: Meter,
    ) -> None:
        if len(numbers) > _MOST:
            raise ValueError(f"got {len(numbers)} numbers to add up over all ranks; at most {_MOST} fit in one sum")
        self._watcher = watcher
        self._meter = meter
        self._name = name
        self._count = len(numbers)
        self._doing = f"{'train' if training else 'evaluat'}ing at step {step}"
        self._ranks = 1 if group is None else dist.get_world_size(group)
        stamp = 2 * (step % _STEPS_TOLD_APART) + training
        unused = [0.0] * (_MOST - len(numbers))
        self._total = torch.tensor([stamp, stamp * stamp, *numbers, *unused], dtype=torch.float64)
        self._work: dist.Work | None = None
        if group is not None:
            meter.all_reduce(CONTROL, self._total.nbytes, self._ranks)
            self._work = dist.all_reduce(self._total, group=group, async_op=True)

    def wait(self) -> list[float]:
        """The sums, in the order of the numbers.

        Raises:
            ValueError: Not all ranks train, or evaluate, at this step.
        """
        if self._work is not None:
            with self._meter.timed("wait_loss"), self._watcher.waiting(self._name):
                self._work.wait()
        stamps, squares, *sums = self._total.tolist()
        if self._ranks * int(squares) != int(stamps) ** 2:
            raise ValueError(
                f"this rank is {self._doing}, but not all ranks are; "
                "every rank must call train_batch and eval_batch in the same order"
            )
        return sums[: self._count]
