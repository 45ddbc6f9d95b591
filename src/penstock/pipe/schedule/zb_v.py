"""ZB-V: no bubble within a rank's span, in 1F1B's memory, over a V."""

from penstock.pipe.schedule.placement import v_shape
from penstock.pipe.schedule.schedule import Schedule, check_sizes
from penstock.pipe.schedule.turns import F0, F1, I0, I1, Part, W, take_turns


def zb_v(ranks: int, micro_batches: int) -> Schedule:
    """Split backward passes over a V (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024).

    With 2 ranks and 4 micro-batches, one column per unit of time::

        rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3
        rank 1 |     1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3

    With fewer micro-batches than ``2p - 1`` the list for as many is taken, without those that are not there.

    * Placement: a V, two chunks per rank.
    * Peak activations: at most ``2p`` chunk activations on any rank, 1F1B's ``p`` of twice the size.
    * Bubble: where F = I = W and ``m >= 2p - 1``, none of any rank's span, and ``(p - 1) F`` of the makespan on every
      rank (F of one chunk), as the spans start one F after another.
    """
    check_sizes(ranks, micro_batches)
    lists = tuple(
        take_turns(_parts(rank, ranks, max(2 * ranks - 1, micro_batches)), (rank, 2 * ranks - 1 - rank), micro_batches)
        for rank in range(ranks)
    )
    return Schedule("zb_v", 2 * ranks, micro_batches, lists, v_shape(ranks))


def _parts(rank: int, ranks: int, micro_batches: int) -> list[Part]:
    below = ranks - rank
    return [
        ([F0], 2 * below - 1),
        ([F1, F0], rank),
        ([F1, I1, W], below),
        ([F0, I0, W, F1, I1, W], micro_batches - 2 * ranks + rank + 1),
        ([I0, W, F1, I1, W], below - 1),
        ([I0, I1], rank),
        ([I0, W], below),
        ([W], 2 * rank),
    ]
