"""ZB-H1: 1F1B whose weight gradients fill two thirds of the bubble, in 1F1B's memory."""

from penstock.pipe.schedule.schedule import Schedule
from penstock.pipe.schedule.split_1f1b import split_1f1b


def zb_h1(ranks: int, micro_batches: int) -> Schedule:
    """1F1B with split backward passes, weight gradients put off (Qi et al., "Zero Bubble", ICLR 2024).

    With 3 ranks and 4 micro-batches, one column per unit of time::

        rank 0 | F0 F1 F2       I0 W0 F3 I1 W1 I2 W2 I3 W3
        rank 1 |    F0 F1    I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        rank 2 |       F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    * Placement: one stage per rank.
    * Peak activations: ``min(p, m)`` micro-batches on every rank, the most that 1F1B has on any.
    * Bubble: where F = I = W and ``m >= p``, every rank idles for ``(p - 1)(F + I - W)`` of the makespan, which is
      also the first rank's span (1F1B: ``(p - 1)(F + I + W)``).
    """
    return split_1f1b("zb_h1", ranks, micro_batches, lead=1)
