"""Schedules by name."""

from collections.abc import Callable
from typing import Final

from penstock._core.suggest import unknown_name
from penstock.pipe.schedule.forward_only import forward_only
from penstock.pipe.schedule.gpipe import gpipe
from penstock.pipe.schedule.one_f_one_b import one_f_one_b
from penstock.pipe.schedule.schedule import Schedule

SCHEDULES: Final[dict[str, Callable[[int, int], Schedule]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "forward_only": forward_only,
}
"""For each name, a pure function ``(num_stages, micro_batches) -> Schedule``."""


def get_schedule(name: str, num_stages: int, micro_batches: int) -> Schedule:
    """The schedule called ``name`` for these sizes.

    Raises:
        ValueError: An unknown name, or fewer than one stage or micro-batch.
    """
    if name not in SCHEDULES:
        raise ValueError(unknown_name("schedule", name, SCHEDULES))
    return SCHEDULES[name](num_stages, micro_batches)
