"""Collectives timed at several sizes, and algorithms timed on this device."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from penstock._core.waiting import Watcher
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.network.link import Link, fit_link

SIZES: Final = (1 << 12, 1 << 16, 1 << 19, 1 << 22)
"""Bytes that a rank sends in one collective."""
SAMPLE: Final = 1 << 20
"""Elements on which an algorithm is timed."""


@dataclass(frozen=True)
class Network:
    """What was measured between the ranks.

    Attributes:
        ranks: How many there are.
        all_reduce: By bytes sent, as all that follow.
        all_to_all: See above.
        all_gather: See above.
    """

    ranks: int
    all_reduce: Link
    all_to_all: Link
    all_gather: Link


@dataclass(frozen=True)
class Codec:
    """What an algorithm costs on this device, and loses.

    Attributes:
        compress_s: Seconds an element, update of the error memory included.
        decompress_s: Seconds an element.
        relative_error: Norm of what is left out over norm of the tensor, of normally distributed numbers.
    """

    compress_s: float
    decompress_s: float
    relative_error: float


def measure_network(
    device: torch.device, watcher: Watcher, *, sizes: Sequence[int] = SIZES, repeats: int = 5
) -> Network:
    """Time collectives over the default group; all ranks get the slowest one's figures.

    Args:
        device: Where the tensors lie.
        watcher: Bounds the waits.
        sizes: Bytes that a rank sends.
        repeats: Of each size, after one that is not counted.
    """
    ranks = dist.get_world_size()

    def all_reduce(nbytes: int) -> Callable[[], object]:
        tensor = torch.zeros(nbytes * ranks // (2 * (ranks - 1) * 4), device=device)
        return lambda: dist.all_reduce(tensor)

    def all_to_all(nbytes: int) -> Callable[[], object]:
        parts = torch.zeros(nbytes // (ranks - 1) * ranks, dtype=torch.uint8, device=device)
        out = torch.empty_like(parts)
        return lambda: dist.all_to_all_single(out, parts)

    def all_gather(nbytes: int) -> Callable[[], object]:
        part = torch.zeros(nbytes // (ranks - 1), dtype=torch.uint8, device=device)
        out = torch.empty(part.numel() * ranks, dtype=torch.uint8, device=device)
        return lambda: dist.all_gather_single(out, part)

    links = []
    for make in (all_reduce, all_to_all, all_gather):
        times = torch.zeros(len(sizes), repeats, dtype=torch.float64)
        for row, nbytes in enumerate(sizes):
            call = make(nbytes)
            for column in range(-1, repeats):
                with watcher.waiting(f"{make.__name__} of {nbytes} bytes"):
                    dist.barrier()
                    start = time.perf_counter()
                    call()
                    _settle(device)
                    if column >= 0:
                        times[row, column] = time.perf_counter() - start
        slowest = times.to(device=device, dtype=torch.float32)
        with watcher.waiting("comparing the ranks' times"):
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        links.append(fit_link([size for size in sizes for _ in range(repeats)], slowest.flatten().tolist()))
    return Network(ranks, *links)


def measure_codec(algorithm: CompressionAlgorithm, device: torch.device, *, numel: int = SAMPLE) -> Codec:
    """Time an algorithm with an error memory on normally distributed numbers, after one call that is not counted.

    Args:
        algorithm: Any algorithm.
        device: Where to compress.
        numel: About how many elements; they lie in a square matrix.
    """
    side = int(numel**0.5)
    tensor = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device)
    if algorithm.lossless:
        return Codec(0.0, 0.0, 0.0)
    seen, error = torch.empty_like(tensor), 0.0
    compress, decompress = [], []
    for call in range(4):
        memory = torch.zeros_like(tensor).view(-1)
        start = _clock(device)
        payload = algorithm.compress_with_memory(tensor, memory)
        middle = _clock(device)
        algorithm.decompress(payload, seen)
        end = _clock(device)
        if call:
            compress.append((middle - start) / tensor.numel())
            decompress.append((end - middle) / tensor.numel())
        error = _norm(tensor - seen) / _norm(tensor)
    return Codec(min(compress), min(decompress), error)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _clock(device: torch.device) -> float:
    _settle(device)
    return time.perf_counter()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
