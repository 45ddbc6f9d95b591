"""DualPipeV: a forward of one chunk beside a backward of the other, over a V."""

from penstock.pipe.schedule.placement import v_shape
from penstock.pipe.schedule.schedule import Schedule, check_sizes
from penstock.pipe.schedule.turns import B0, B1, F0, F1, I0, I1, Part, W, take_turns


def dualpipe_v(ranks: int, micro_batches: int) -> Schedule:
    """The cut-in-half form of DualPipe (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024), as PyTorch has it too.

    With 2 ranks and 4 micro-batches (B two units long)::

        rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1==== 3F2 0B0==== 3B2==== 3F3     0B1==== 3B3==== 0I2 0W2 0I3 0W3
        rank 1 |     1F0 2F0 1F1 2F1 1F2 2B0==== 2F2 1B0==== 1F3 2B1==== 2F3 1B1==== 2B2==== 1B2==== 2I3 1I3 2W3 1W3

    In the steady state, ``0F 1B 1F 0B``, kernels may overlap each forward with the backward beside it, for example
    to hide the exchange of experts; the engine runs them one after the other.

    With fewer micro-batches than stages the list for as many is taken, without those that are not there.

    * Placement: a V, two chunks per rank.
    * Peak activations: at most ``min(2p + 1, 2m)`` chunk activations on any rank (1F1B: ``2p`` of this size).
    * Bubble: where F = I = W, ``m >= 2p`` and nothing overlaps, ``(p - 1) F`` of the makespan on every rank (F of one
      chunk), which is also the first rank's span.
    """
    check_sizes(ranks, micro_batches)
    lists = tuple(
        take_turns(_parts(rank, ranks, max(2 * ranks, micro_batches)), (rank, 2 * ranks - 1 - rank), micro_batches)
        for rank in range(ranks)
    )
    return Schedule("dualpipe_v", 2 * ranks, micro_batches, lists, v_shape(ranks))


def _parts(rank: int, ranks: int, micro_batches: int) -> list[Part]:
    behind, upto = ranks - rank - 1, rank + 1
    # The second half of the last pairs of backwards is split, so that their weight gradients fill the end.
    whole, split = ([B1, B0] * upto)[:upto], ([I1, I0] * upto)[upto:]
    return [
        ([F0], 2 * behind),
        ([F0, F1], upto),
        ([I1, W, F1], behind),
        ([F0, B1, F1, B0], micro_batches - 2 * ranks + upto),
        ([B1, F1, B0], behind),
        (whole, 1),
        (split, 1),
        ([W, I0], behind),
        ([W], upto),
    ]
