"""What a collective costs: a latency, and seconds for every byte that a rank sends.

The model of Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel Computing 1994.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Link:
    """Seconds of a collective by the bytes that each rank sends.

    Attributes:
        latency_s: Seconds of a collective of no bytes.
        seconds_per_byte: Seconds more for each byte.
    """

    latency_s: float
    seconds_per_byte: float

    @property
    def bits_per_second(self) -> float:
        """Bandwidth of one rank; infinite where bytes cost nothing that could be measured."""
        return 8 / self.seconds_per_byte if self.seconds_per_byte else float("inf")

    def seconds(self, nbytes: float, calls: int = 1) -> float:
        """Seconds to send ``nbytes`` in ``calls`` collectives."""
        return self.latency_s * calls + self.seconds_per_byte * nbytes


def fit_link(nbytes: Sequence[int], seconds: Sequence[float]) -> Link:
    """The line through measurements that a few bad ones do not move (Theil and Sen: medians of slopes and offsets).

    Args:
        nbytes: Bytes sent, of at least two sizes.
        seconds: As many times.

    Raises:
        ValueError: The numbers of sizes and times differ, or there is only one size.
    """
    if len(nbytes) != len(seconds):
        raise ValueError(f"{len(nbytes)} sizes but {len(seconds)} times; give one time for each size")
    if len(set(nbytes)) < 2:
        raise ValueError(f"a line needs at least two sizes, got {sorted(set(nbytes))}")
    points = list(zip(nbytes, seconds, strict=True))
    slopes = [(t2 - t1) / (b2 - b1) for (b1, t1), (b2, t2) in combinations(points, 2) if b1 != b2]
    slope = max(statistics.median(slopes), 0.0)
    # The smallest messages say what latency is; those of the largest are lost in the noise of their bandwidth.
    least = min(nbytes)
    latency = statistics.median(t - slope * b for b, t in points if b == least)
    return Link(max(latency, 0.0), slope)
