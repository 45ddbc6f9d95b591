"""What the activations that a schedule keeps take."""

import numpy as np

from penstock.pipe.schedule.actions import B_CODE, F_CODE, W_CODE
from penstock.pipe.schedule.costs import PerStage, per_stage
from penstock.pipe.schedule.schedule import Schedule


def peak_memory(schedule: Schedule, activations: PerStage = 1.0) -> tuple[float, ...]:
    """For each rank, the most that its activations take at a time.

    Args:
        schedule: A schedule with backward passes.
        activations: What one micro-batch (or slice) of a stage takes from F to the end of B or W, in any unit; 1 counts
            as :meth:`Schedule.peak_activations` does.
    """
    weights = np.array(per_stage("activations", activations, schedule.num_stages))
    sign = np.zeros(4)
    sign[[F_CODE, B_CODE, W_CODE]] = 1.0, -1.0, -1.0
    return tuple(
        float(np.cumsum(sign[actions.ops] * weights[actions.stages]).max(initial=0.0)) for actions in schedule.ranks
    )
