"""V-Min: a third of 1F1B's activations, and two thirds of its bubble."""

from penstock.pipe.schedule.building_block import Steps, repeat_block
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def v_min(ranks: int, micro_batches: int) -> Schedule:
    """A V through which every micro-batch passes without a stop (Qi et al., "Controllable Memory", NeurIPS 2024).

    * Placement: a V, two chunks per rank.
    * Peak activations: at most ``ceil(2p / 3) + 2`` chunk activations on any rank, about a third of 1F1B's ``2p`` of
      this size.
    * Bubble: where F = I = W and ``m >= 2p``, ``4p - 5`` units of the makespan (``4p - 3`` where 3 divides ``p``;
      1F1B: ``6 (p - 1)`` of these), which is also the longest rank's span.
    """
    check_sizes(ranks, micro_batches)
    # Where 3 divides p, back at once would make two actions of a rank fall on the same of six units.
    steps = Steps(1, 1, 1, 1 if ranks % 3 else 3, 1, 1, 1)
    return repeat_block("v_min", ranks, micro_batches, steps, memory=-(-2 * ranks // 3) + 2)
