"""V-Half: half of 1F1B's activations, and half of its bubble."""

from penstock.pipe.schedule.building_block import Steps, repeat_block
from penstock.pipe.schedule.schedule import Schedule, check_sizes


def v_half(ranks: int, micro_batches: int) -> Schedule:
    """A V whose activations live half as long as ZB-V's (Qi et al., "Controllable Memory", NeurIPS 2024).

    * Placement: a V, two chunks per rank.
    * Peak activations: at most ``p + 2`` chunk activations on any rank, about half of 1F1B's ``2p`` of this size.
    * Bubble: where F = I = W, ``p > 2`` and ``m >= 2p``, ``3p - 5`` units of the makespan (1F1B: ``6 (p - 1)`` of
      these), which is also the longest rank's span.
    """
    check_sizes(ranks, micro_batches)
    # So chosen that no two actions of a rank fall on the same of six units.
    turn, back, turn_back = (1, 2, 1) if ranks % 2 else (4, 2, 4)
    steps = Steps(2, turn, 1, back, 2, turn_back, 1)
    return repeat_block("v_half", ranks, micro_batches, steps, memory=ranks + 2)
