"""ZB-H2: twice the forwards ahead, and no bubble within a rank's span."""

from penstock.pipe.schedule.schedule import Schedule
from penstock.pipe.schedule.split_1f1b import split_1f1b


def zb_h2(ranks: int, micro_batches: int) -> Schedule:
    """ZB-H1 with twice the forwards ahead (Qi et al., "Zero Bubble", ICLR 2024).

    With 2 ranks and 4 micro-batches, one column per unit of time::

        rank 0 | F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3
        rank 1 |    F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    * Placement: one stage per rank.
    * Peak activations: ``min(2p - 1, m)`` micro-batches on every rank.
    * Bubble: where F = I = W and ``m >= 2p - 1`` no rank idles within its span (``(p - 1)(F + I - 2W) = 0``). Of the
      makespan each idles for ``(p - 1) F``, as the spans start one F after another: steps that follow one another
      without a barrier overlap there.
    """
    return split_1f1b("zb_h2", ranks, micro_batches, lead=2)
