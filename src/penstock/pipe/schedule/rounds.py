"""Let all ranks run through their actions at once."""

import numpy as np
import numpy.typing as npt

from penstock.pipe.schedule.graph import IntArray

FloatArray = npt.NDArray[np.float64]


def run_through(
    first: npt.NDArray[np.int64],
    needs: IntArray,
    *,
    lags: FloatArray,
    durations: FloatArray,
    room: IntArray | None = None,
) -> FloatArray:
    """When each action ends, if every rank takes its actions in order and each as soon as it can.

    In each round every rank whose next action has what it waits for takes that action. The order in which ranks are
    looked at does not matter: the end of an action depends on the ends of those before it only.

    Args:
        first: ``int64[ranks + 1]``, where each rank's actions begin.
        needs: ``int32[n]``, an action that must end before, or -1.
        lags: ``float64[n]``, how long its value travels.
        durations: ``float64[n]``.
        room: ``int32[n]``, another action that must end before, or -1.

    Returns:
        ``float64[n]``; infinity for actions that wait for ever.
    """
    count = len(needs)
    # The last place stands for -1, "nothing to wait for": it ended when time began.
    ends = np.full(count + 1, np.inf)
    ends[-1] = 0.0
    at, stop = first[:-1].copy(), first[1:]
    alive = at < stop
    at, stop = at[alive], stop[alive]
    clock = np.zeros(len(at))
    while len(at):
        arrival = ends[needs[at]] + lags[at]
        if room is not None:
            arrival = np.maximum(arrival, ends[room[at]])
        going = np.flatnonzero(arrival < np.inf)
        if not len(going):
            break
        taken = at[going]
        finished = np.maximum(clock[going], arrival[going]) + durations[taken]
        ends[taken] = finished
        clock[going] = finished
        taken += 1
        at[going] = taken
        if (taken == stop[going]).any():
            alive = at < stop
            at, stop, clock = at[alive], stop[alive], clock[alive]
    return ends[:-1]
