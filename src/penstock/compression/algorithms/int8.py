"""Eight bits an element."""

from penstock.compression.algorithms._integer import Integer


class Int8(Integer):
    """Multiples of ``max|block| / 127``: a byte an element and a float32 scale per block.

    Args:
        block_size: Elements that share a scale.
        stochastic: Round at random, which is unbiased.
        seed: Of the random numbers.
    """

    name = "int8"
    bits = 8
    top = 127

    def __init__(self, *, block_size: int = 256, stochastic: bool = False, seed: int = 0) -> None:
        super().__init__(block_size=block_size, stochastic=stochastic, seed=seed)
