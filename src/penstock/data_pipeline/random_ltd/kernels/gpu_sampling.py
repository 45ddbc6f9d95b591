# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Drawing the kept tokens on a CUDA GPU: integer arithmetic only, so that the choice is the CPU's, bit by bit.

One program draws one row: every token's word by the same mixing as :func:`penstock._core.keys.random_words`, the K-th
smallest word by bisection over its 64 bits, and the places of all words up to it by a running count.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock._core.keys import U64Array

_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _sample_kernel(streams, indices, length, kept, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    inside = token < length
    start = tl.load(streams + 2 * row).to(tl.uint64, bitcast=True)
    key = tl.load(streams + 2 * row + 1).to(tl.uint64, bitcast=True)
    word = _mix(_mix((start + token.to(tl.uint64)) * _GOLDEN + key) + _GOLDEN)
    # The largest word that fewer than K words are smaller than: the K-th smallest.
    largest = key ^ key
    bit = (largest + 1) << 63
    for _ in range(64):
        tried = largest | bit
        smaller = tl.sum(((word < tried) & inside).to(tl.int32), axis=0)
        largest = tl.where(smaller < kept, tried, largest)
        bit = bit >> 1
    chosen = (word <= largest) & inside
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(indices + row * kept + place, token, mask=chosen)


def sample(streams: U64Array, length: int, kept: int, device: torch.device) -> Tensor:
    """Draw ``kept`` of ``length`` tokens for each row.

    Args:
        streams: ``[L, B, 2]``: the counter of each row's first token, and the key.
        length: Tokens of each row; one program holds them all.
        kept: Tokens to keep in each row.
        device: Where to draw.

    Returns:
        int32 ``[L, B, K]``, increasing along the last dimension.
    """
    layers, batch, _ = streams.shape
    indices = torch.empty(layers, batch, kept, dtype=torch.int32, device=device)
    on_device = torch.from_numpy(streams.view(np.int64)).to(device)
    block = triton.next_power_of_2(length)
    with torch.cuda.device_of(indices):  # which need not be the current one, where Triton would launch
        _sample_kernel[(layers * batch,)](on_device, indices, length, kept, BLOCK=block, num_warps=_warps(block))
    return indices


def _warps(block: int) -> int:
    """So many that a thread holds 16 words or fewer, as far as a program may have them."""
    return min(32, max(1, block // (32 * 16)))
