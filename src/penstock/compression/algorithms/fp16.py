"""Half precision on the wire."""

import torch

from penstock.compression.algorithms._cast import Cast


class Fp16(Cast):
    """IEEE half precision: 11 significant bits, 2 bytes an element.

    Values beyond 65504 become infinite, which the receiver sees; the collectives therefore divide by the number of
    ranks *before* the cast. Values below 6e-8 vanish; error feedback keeps them until they add up.
    """

    name = "fp16"
    sent_as = torch.float16
