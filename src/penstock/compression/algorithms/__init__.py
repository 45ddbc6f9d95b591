"""The algorithms that come with Penstock."""

from penstock.compression.algorithms.bf16 import Bf16
from penstock.compression.algorithms.dct_topk import DctTopK
from penstock.compression.algorithms.fp8 import Fp8
from penstock.compression.algorithms.fp16 import Fp16
from penstock.compression.algorithms.int2 import Int2
from penstock.compression.algorithms.int4 import Int4
from penstock.compression.algorithms.int8 import Int8
from penstock.compression.algorithms.none import NoCompression
from penstock.compression.algorithms.onebit import OneBit
from penstock.compression.algorithms.powersgd import PowerSGD
from penstock.compression.algorithms.randomk import RandomK
from penstock.compression.algorithms.topk import TopK
from penstock.compression.algorithms.topk_int2 import TopKInt2

BUILT_IN = (
    NoCompression,
    Fp16,
    Bf16,
    Fp8,
    Int8,
    Int4,
    Int2,
    OneBit,
    TopK,
    TopKInt2,
    RandomK,
    DctTopK,
    PowerSGD,
)

__all__ = [
    "BUILT_IN",
    "Bf16",
    "DctTopK",
    "Fp8",
    "Fp16",
    "Int2",
    "Int4",
    "Int8",
    "NoCompression",
    "OneBit",
    "PowerSGD",
    "RandomK",
    "TopK",
    "TopKInt2",
]
