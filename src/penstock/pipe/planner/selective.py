"""Chooses the layers that are recomputed so that a layout fits in the memory."""

from collections.abc import Sequence
from typing import Final

from penstock.pipe.planner.profile import LayerCosts, Profile
from penstock.pipe.planner.stages import StageCosts
from penstock.pipe.schedule import Schedule

_NOTHING_SAVED: Final = float("inf")


def select_recomputed(
    profile: Profile, schedule: Schedule, bounds: Sequence[int], memory: int
) -> tuple[int, ...] | None:
    """Layers to recompute, each by itself, so that every rank's peak is at most ``memory`` bytes.

    Each rank takes its layers by seconds per byte saved, the cheapest first, until it fits; then it gives back what it
    can do without, the slowest first. Where layers save independently, a rank so recomputes for at most one layer's
    time more than the best choice would: all but the last layer taken cost no more than that does.

    Returns:
        Their canonical indices; None where a rank does not fit whatever is recomputed. Empty where all ranks fit.
    """
    chosen: set[int] = set()

    def fits(rank: int) -> bool:
        return StageCosts.of(profile, bounds, recomputed=chosen).memory(schedule)[rank] <= memory

    for rank in range(schedule.num_ranks):
        mine = [i for stage in schedule.stages_of(rank) for i in range(bounds[stage], bounds[stage + 1])]
        price = {i: _price(profile.layers, i) for i in mine}
        left = sorted((i for i in mine if price[i] < _NOTHING_SAVED), key=lambda i: (price[i], i))
        taken: list[int] = []
        while not fits(rank):
            if not left:
                return None
            taken.append(left.pop(0))
            chosen.add(taken[-1])
        for index in sorted(taken, key=lambda i: profile.layers[i].forward, reverse=True):
            chosen.discard(index)
            if not fits(rank):
                chosen.add(index)
    return tuple(sorted(chosen))


def _price(layers: Sequence[LayerCosts], index: int) -> float:
    """Seconds per byte that recomputing a layer saves for each micro-batch in flight."""
    layer = layers[index]
    held = layers[index - 1].output if index > 0 else 0
    saved = layer.kept - layer.loss_kept - held
    return layer.forward / saved if saved > 0 else _NOTHING_SAVED
