"""The algorithms that come with Penstock."""

from penstock.compression.algorithms.bf16 import Bf16
from penstock.compression.algorithms.fp16 import Fp16
from penstock.compression.algorithms.none import NoCompression
from penstock.compression.algorithms.onebit import OneBit

__all__ = ["Bf16", "Fp16", "NoCompression", "OneBit"]
