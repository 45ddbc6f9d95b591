"""Predict when each action of a schedule runs."""

import numpy as np

from penstock.pipe.schedule.actions import B_CODE, F_CODE, I_CODE, OP_NAMES
from penstock.pipe.schedule.costs import Costs
from penstock.pipe.schedule.graph import Graph
from penstock.pipe.schedule.rounds import FloatArray, run_through
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.timeline import Timeline


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run a schedule in imagination: each rank takes its actions in order, each as soon as its inputs have arrived.

    Messages take ``costs.transfer`` between ranks and nothing within one; they occupy nobody and are never held up, as
    with an engine that posts receives ahead and does not wait for sends. All ranks advance together by one action a
    round, so there are as many rounds as the longest chain of actions is long: seconds for 1,024 stages and 4,096
    micro-batches.

    Args:
        schedule: A valid schedule.
        costs: Durations. By default F, I and W take 1 and B takes 2.

    Returns:
        The timeline, which starts at 0.

    Raises:
        ScheduleError: Costs that do not fit the stages, or a rank that would wait for ever.
    """
    costs = costs or Costs()
    table = costs.table(schedule.num_stages)
    lags_by_op = _lags(schedule, costs)
    graph = Graph.of(schedule)
    durations = np.array([table[name] for name in OP_NAMES])[graph.ops, graph.stages]
    lags = lags_by_op[graph.ops, graph.stages]
    ends = run_through(graph.first, graph.needs, lags=lags, durations=durations)
    stuck = np.flatnonzero(np.isinf(ends))
    if len(stuck):
        rank = int(np.searchsorted(graph.first, stuck[0], side="right")) - 1
        action = schedule.ranks[rank][int(stuck[0] - graph.first[rank])]
        raise ScheduleError(
            f"schedule {schedule.name!r}, rank {rank}, action {action}: it waits for ever for what it needs; "
            "validate() tells why"
        )
    # Each action starts when the one before it on its rank has ended and its value has arrived.
    starts = np.append(ends, 0.0)[graph.needs] + lags
    starts[1:] = np.maximum(starts[1:], np.where(_follows(graph), ends[:-1], 0.0))
    cuts = graph.first[1:-1]
    return Timeline(schedule, tuple(np.split(starts, cuts)), tuple(np.split(ends, cuts)))


def _follows(graph: Graph) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """For every action but the first: whether the one before it in the row is on the same rank."""
    follows = np.ones(max(0, len(graph.ops) - 1), dtype=np.bool_)
    borders = graph.first[1:-1]
    follows[borders[(borders > 0) & (borders < len(graph.ops))] - 1] = False
    return follows


def _lags(schedule: Schedule, costs: Costs) -> FloatArray:
    """``float64[ops, stages]``: how long the value an action needs travels."""
    transfers = costs.transfers(schedule.num_stages)
    placement = np.array(schedule.placement)
    between = np.where(placement[1:] != placement[:-1], transfers, 0.0)
    lags = np.zeros((len(OP_NAMES), schedule.num_stages))
    lags[F_CODE, 1:] = between
    lags[B_CODE, :-1] = between
    lags[I_CODE, :-1] = between
    return lags
