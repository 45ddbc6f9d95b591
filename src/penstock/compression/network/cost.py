"""What a step costs with an algorithm on a network, and which algorithm to take.

A step is what it computes, what compression computes on the same device, and what of the wire's time is not hidden
under the backward pass: two thirds of the compute, of which the last bucket's exchange has nothing left to hide under.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.algorithms.powersgd import PowerSGD
from penstock.compression.buckets import DEFAULT_BUCKET_BYTES
from penstock.compression.network.probe import Codec, Network

OVERLAP: Final = 2 / 3
"""Share of the compute that is backward pass."""
TOLERANCE: Final = 0.2
"""What an exchange may add to a step, as a share of its compute, before a lossier one is worth while."""

Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Exchange:
    """What one rank sends in one exchange, and how many elements it compresses and decompresses.

    Attributes:
        all_reduce: Bytes.
        all_to_all: Bytes.
        all_gather: Bytes.
        compressed: Elements.
        decompressed: Elements.
        rounds: Collectives of a bucket.
    """

    all_reduce: float = 0.0
    all_to_all: float = 0.0
    all_gather: float = 0.0
    compressed: float = 0.0
    decompressed: float = 0.0
    rounds: int = 1

    @property
    def nbytes(self) -> float:
        """Bytes that one rank sends."""
        return self.all_reduce + self.all_to_all + self.all_gather


@dataclass(frozen=True)
class Prediction:
    """What a step is expected to cost.

    Attributes:
        algorithm: Its name.
        period: Steps between two exchanges.
        step_s: Seconds of a step, on average over a period.
        nbytes: Bytes that a rank sends per step, on average over a period.
        relative_error: What one compression leaves out, see :class:`Codec`.
    """

    algorithm: str
    period: int
    step_s: float
    nbytes: float
    relative_error: float


def exchange_of(algorithm: CompressionAlgorithm, shapes: Shapes, ranks: int) -> Exchange:
    """What an exchange of tensors of these shapes sends and computes."""
    numel = sum(math.prod(shape) for shape in shapes)
    pieces: Sequence[Sequence[int] | int] = shapes if algorithm.shaped else [numel]
    payload = sum(algorithm.bytes_for(piece) for piece in pieces)
    rest = ranks - 1
    if algorithm.linear or isinstance(algorithm, PowerSGD):
        rounds = 1 if algorithm.linear else 2
        return Exchange(all_reduce=2 * rest / ranks * payload, compressed=numel, decompressed=numel, rounds=rounds)
    if algorithm.sparse or algorithm.shaped:
        return Exchange(all_gather=rest * payload, compressed=numel, decompressed=ranks * numel)
    share = rest / ranks * payload
    return Exchange(
        all_to_all=share, all_gather=share, compressed=numel * (1 + 1 / ranks), decompressed=2 * numel, rounds=2
    )


def predict(
    algorithm: CompressionAlgorithm,
    codec: Codec,
    network: Network,
    shapes: Shapes,
    compute_s: float,
    *,
    period: int = 1,
) -> Prediction:
    """What a step costs.

    Args:
        algorithm: Any algorithm.
        codec: What it costs on this device.
        network: What was measured between the ranks.
        shapes: The parameters'.
        compute_s: Seconds of a step on one rank, without any exchange.
        period: Steps between two exchanges; with more than one, nothing is hidden under a backward pass.
    """
    exchange = exchange_of(algorithm, shapes, network.ranks)
    buckets = max(1, math.ceil(4 * sum(math.prod(shape) for shape in shapes) / DEFAULT_BUCKET_BYTES))
    wire_s = 0.0
    for link, nbytes in (
        (network.all_reduce, exchange.all_reduce),
        (network.all_to_all, exchange.all_to_all),
        (network.all_gather, exchange.all_gather),
    ):
        if nbytes:
            calls = buckets * (exchange.rounds if link is network.all_reduce else 1)
            wire_s += link.seconds(nbytes, calls)
    codec_s = exchange.compressed * codec.compress_s + exchange.decompressed * codec.decompress_s
    hidden_s = OVERLAP * compute_s if period == 1 else 0.0
    exposed_s = max(wire_s - hidden_s, wire_s / buckets)
    step_s = compute_s + (codec_s + exposed_s) / period
    return Prediction(algorithm.name, period, step_s, exchange.nbytes / period, codec.relative_error)


def recommend(predictions: Sequence[Prediction], compute_s: float) -> Prediction:
    """The one that loses least of those that add at most a fifth to the compute; where none does, the fastest.

    Only methods that exchange at every step are considered. On a faster network the choice never sends less.

    Raises:
        ValueError: There is none that exchanges at every step.
    """
    every_step = [prediction for prediction in predictions if prediction.period == 1]
    if not every_step:
        raise ValueError("nothing to recommend: no prediction exchanges at every step")
    cheap = [prediction for prediction in every_step if prediction.step_s <= (1 + TOLERANCE) * compute_s]
    if cheap:
        return min(cheap, key=lambda p: (p.relative_error, p.step_s))
    return min(every_step, key=lambda p: (p.step_s, p.relative_error))


def quality(relative_error: float) -> str:
    """What an algorithm is expected to cost in quality, in words."""
    if relative_error == 0:
        return "none: the exchange is exact"
    share = f"{relative_error:.1%} of a gradient's norm is left out of a step"
    if relative_error < 0.01:
        return f"none that is likely to show: {share}"
    if relative_error < 0.3:
        return f"small: {share}, and sent later by error feedback"
    return (
        f"noticeable under Adam: {share}, and sent later by error feedback; with onebit take OneBitAdam, which "
        "compresses momentum, and compare losses before a long run"
    )


def square_shapes(parameters: int) -> list[list[int]]:
    """A stand-in for a model of which only the size is known: square matrices of 1,024 rows, and a vector."""
    matrices, rest = divmod(parameters, 1 << 20)
    return [[1024, 1024]] * matrices + ([[rest]] if rest else [])


def as_mapping(prediction: Prediction) -> Mapping[str, float | int | str]:
    """A prediction as a JSON value."""
    return {
        "algorithm": prediction.algorithm,
        "period": prediction.period,
        "step_s": prediction.step_s,
        "bytes": prediction.nbytes,
        "relative_error": prediction.relative_error,
    }
