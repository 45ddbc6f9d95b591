"""Four bits an element."""

from penstock.compression.algorithms._integer import Integer


class Int4(Integer):
    """Multiples of ``max|block| / 7``: half a byte an element and a float32 scale per block.

    Args:
        block_size: Elements that share a scale, an even number; a smaller block has less error.
        stochastic: Round at random, which is unbiased.
        seed: Of the random numbers.
    """

    name = "int4"
    bits = 4
    top = 7

    def __init__(self, *, block_size: int = 128, stochastic: bool = False, seed: int = 0) -> None:
        super().__init__(block_size=block_size, stochastic=stochastic, seed=seed)
