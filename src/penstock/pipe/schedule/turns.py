"""Lists of actions of two chunks on a rank, written as turns that repeat."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from penstock.pipe.schedule.actions import B_CODE, F_CODE, I_CODE, W_CODE, Actions

Turn = tuple[int, int]
"""An op's code and the chunk on which it is done; a W takes the input gradient that has waited longest."""
F0: Final[Turn] = (F_CODE, 0)
F1: Final[Turn] = (F_CODE, 1)
B0: Final[Turn] = (B_CODE, 0)
B1: Final[Turn] = (B_CODE, 1)
I0: Final[Turn] = (I_CODE, 0)
I1: Final[Turn] = (I_CODE, 1)
W: Final[Turn] = (W_CODE, 0)

Part = tuple[Sequence[Turn], int]
"""Turns, and how many times over."""


def take_turns(parts: Sequence[Part], stages: tuple[int, int], micro_batches: int) -> Actions:
    """Number the turns: each op goes through each chunk's micro-batches in ascending order, B and I together.

    Turns of micro-batches beyond ``micro_batches`` are left out. What one micro-batch waits for is never done for
    another, so a list for more of them stays runnable.

    Args:
        parts: The turns, in order.
        stages: The stages that are chunk 0 and chunk 1 of this rank.
        micro_batches: How many to keep.
    """
    repeated = [np.tile(np.array(turns, dtype=np.int32), (times, 1)) for turns, times in parts if times and turns]
    ops, chunks = np.concatenate(repeated).T.copy()
    units = np.empty(len(ops), dtype=np.int32)
    for chunk in (0, 1):
        for codes in ((F_CODE,), (B_CODE, I_CODE)):
            mine = np.flatnonzero(np.isin(ops, codes) & (chunks == chunk))
            units[mine] = np.arange(len(mine))
    split, weights = ops == I_CODE, ops == W_CODE
    units[weights], chunks[weights] = units[split], chunks[split]
    kept = units < micro_batches
    return Actions(np.where(chunks == 0, *stages)[kept], ops[kept], units[kept])
