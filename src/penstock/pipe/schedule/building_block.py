"""V-shaped schedules from a building block that is repeated, squeezed and filled up."""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.pipe.schedule.actions import F_CODE, I_CODE, W_CODE, Actions
from penstock.pipe.schedule.graph import Graph
from penstock.pipe.schedule.periodic import Column, periodic
from penstock.pipe.schedule.placement import v_shape
from penstock.pipe.schedule.schedule import Schedule

_PERIOD: Final = 6
"""A rank has six actions for every micro-batch: F, I and W of both chunks."""


class Steps(NamedTuple):
    """The building block: how long after one action of a micro-batch the next starts, every action one unit long.

    Attributes:
        forward_down: From a stage's F to the next one's, in the first chunks.
        turn: From the last of these to the F of the second chunk on the same rank.
        forward_up: From F to F in the second chunks.
        back: From the last stage's F to its I.
        backward_down: From I to I in the second chunks.
        turn_back: From the last of these to the I of the first chunk on the same rank.
        backward_up: From I to I in the first chunks.
    """

    forward_down: int
    turn: int
    forward_up: int
    back: int
    backward_down: int
    turn_back: int
    backward_up: int


def repeat_block(name: str, ranks: int, micro_batches: int, steps: Steps, *, memory: int) -> Schedule:
    """Repeat a block for every micro-batch, then let the actions run as early as they can.

    Qi et al., "Pipeline Parallelism with Controllable Memory" (NeurIPS 2024). The block fixes when the Fs and Is of
    one micro-batch run; the next one's follow ``_PERIOD`` units later. No two of a rank's may fall on the same unit.
    That gives the order of each rank's Fs and Is. They are then played in that order, each as early as it can, which
    squeezes the warm-up and the cool-down, and a W takes every unit in which the next of them has to wait. How long
    activations live, and so how many a rank keeps, follows from the block.

    Args:
        name: The schedule's.
        ranks: Pipeline ranks ``p``, two chunks each.
        micro_batches: Micro-batches ``m``.
        steps: The building block.
        memory: Chunk activations a rank may keep; an F that would go beyond waits for a W.
    """
    placement = v_shape(ranks)
    order = Schedule(
        name, 2 * ranks, micro_batches, tuple(_order(r, ranks, micro_batches, steps) for r in range(ranks)), placement
    )
    return Schedule(name, 2 * ranks, micro_batches, _fill_up(order, memory), placement)


def _order(rank: int, ranks: int, micro_batches: int, steps: Steps) -> Actions:
    """A rank's Fs and Is in the order in which they start where the block is repeated."""
    span, above = ranks - 1, ranks - 1 - rank
    turned = span * steps.forward_down + steps.turn
    at_end = turned + span * steps.forward_up + steps.back
    returned = at_end + span * steps.backward_down + steps.turn_back
    down, up = rank, 2 * ranks - 1 - rank
    starts = [
        (rank * steps.forward_down, F_CODE, down),
        (turned + above * steps.forward_up, F_CODE, up),
        (at_end + rank * steps.backward_down, I_CODE, up),
        (returned + above * steps.backward_up, I_CODE, down),
    ]
    assert len({start % _PERIOD for start, _, _ in starts}) == len(starts), (ranks, rank, steps)
    every = np.arange(micro_batches, dtype=np.int32)
    starts.sort(key=lambda entry: entry[0] % _PERIOD)
    return periodic([Column(op, start // _PERIOD, stage, every) for start, op, stage in starts])


def _fill_up(order: Schedule, memory: int) -> tuple[Actions, ...]:
    """Play the Fs and Is unit by unit, and give each rank that has to wait the W that has waited longest."""
    graph = Graph.of(order)
    begin, stop = graph.first[:-1], graph.first[1:]
    ended = np.full(len(graph.ops) + 1, np.iinfo(np.int64).max)
    ended[-1] = 0  # Stands for -1, nothing to wait for.
    is_forward = graph.ops == F_CODE
    split = np.flatnonzero(~is_forward)
    at = begin.copy()
    kept = np.zeros(order.num_ranks, dtype=np.int64)
    # Each rank's Is in order: where its first stands in `split`, the next to get its W, and the next to be done.
    oldest = np.searchsorted(split, begin)
    newest = oldest.copy()
    taken_ranks: list[npt.NDArray[np.int64]] = []
    taken: list[npt.NDArray[np.int64]] = []
    weights: list[npt.NDArray[np.bool_]] = []
    now = 0
    left = len(graph.ops) + len(split)
    while left:
        here = np.flatnonzero(at < stop)
        there = at[here]
        forward = is_forward[there]
        goes = (ended[graph.needs[there]] <= now) & (~forward | (kept[here] < memory))
        going, actions = here[goes], there[goes]
        forward = forward[goes]
        waits = oldest < newest
        waits[going] = False
        filling = np.flatnonzero(waits)
        assert len(going) or len(filling), (order.name, now)
        now += 1
        ended[actions] = now
        at[going] += 1
        kept[going] += forward
        newest[going] += ~forward
        taken_ranks += [going, filling]
        taken += [actions, split[oldest[filling]]]
        weights += [np.zeros(len(going), np.bool_), np.ones(len(filling), np.bool_)]
        kept[filling] -= 1
        oldest[filling] += 1
        left -= len(going) + len(filling)
    rank_of, action_of = np.concatenate(taken_ranks), np.concatenate(taken)
    weight = np.concatenate(weights)
    by_rank = np.argsort(rank_of, kind="stable")
    action_of, weight = action_of[by_rank], weight[by_rank]
    ops = np.where(weight, W_CODE, graph.ops[action_of])
    cuts = np.searchsorted(rank_of[by_rank], np.arange(1, order.num_ranks))
    parts = (np.split(array, cuts) for array in (graph.stages[action_of], ops, graph.units[action_of]))
    return tuple(Actions(*arrays) for arrays in zip(*parts, strict=True))
