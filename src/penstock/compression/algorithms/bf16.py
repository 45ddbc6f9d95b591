"""bfloat16 on the wire."""

from collections.abc import Sequence

import torch

from penstock.compression.algorithms._cast import Cast


class Bf16(Cast):
    """bfloat16: 8 significant bits with float32's range, 2 bytes an element."""

    name = "bf16"
    sent_as = torch.bfloat16

    def contraction(self, shape: Sequence[int] | int) -> float:
        """``1 - 2**-16``: an element loses at most half a unit in its last place (subnormal numbers apart)."""
        return 1 - 2.0**-16
