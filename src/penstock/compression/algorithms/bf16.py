"""bfloat16 on the wire."""

import torch

from penstock.compression.algorithms._cast import Cast


class Bf16(Cast):
    """bfloat16: 8 significant bits with float32's range, 2 bytes an element."""

    name = "bf16"
    sent_as = torch.bfloat16
