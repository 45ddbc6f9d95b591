"""Counts what a run really spends: bytes on the wire by kind, and seconds by activity."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

REPLICAS: Final = "replicas"
"""Gradient (or momentum, or parameter) exchange between data-parallel replicas."""
TIED: Final = "tied"
"""Sums of tied weights' gradients over the stages that own a copy."""
ACTIVATIONS: Final = "activations"
"""Stage values and their gradients between pipeline stages."""
MODEL: Final = "model"
"""Sums and gathers of divided layers over tensor-parallel ranks."""
CONTROL: Final = "control"
"""Losses, handshakes, barriers and other small talk."""


class Meter:
    """Bytes and seconds of one process, added up where they are spent.

    Attributes:
        sent: Bytes that this rank handed to the network, by kind. For a collective this is what its algorithm moves:
            ``2 (n-1)/n`` of the buffer for an all-reduce over ``n`` ranks, ``(n-1)/n`` for an all-to-all, ``(n-1)``
            times its own part for an all-gather.
        received: The same for what arrived.
        spared_sent: Bytes more that compression kept off the network, by kind, where no formula tells them.
        spared_received: The same for what arrived.
        seconds: Wall-clock seconds by activity, for example ``compute``, ``wait_forward``.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.spared_sent: Counter[str] = Counter()
        self.spared_received: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}

    def count(self, kind: str, *, sent: int = 0, received: int = 0) -> None:
        """Add bytes to a kind."""
        self.sent[kind] += sent
        self.received[kind] += received

    def spare(self, kind: str, *, sent: int = 0, received: int = 0) -> None:
        """Add bytes to those of a kind that compression saved."""
        self.spared_sent[kind] += sent
        self.spared_received[kind] += received

    def all_reduce(self, kind: str, nbytes: int, ranks: int) -> None:
        """Count an all-reduce of a buffer of ``nbytes`` over ``ranks`` ranks."""
        share = 2 * nbytes * (ranks - 1) // ranks
        self.count(kind, sent=share, received=share)

    def all_gather(self, kind: str, nbytes: int, ranks: int) -> None:
        """Count an all-gather to which this rank contributes ``nbytes``."""
        share = nbytes * (ranks - 1)
        self.count(kind, sent=share, received=share)

    def add_seconds(self, activity: str, seconds: float) -> None:
        """Add wall-clock seconds to an activity."""
        self.seconds[activity] = self.seconds.get(activity, 0.0) + seconds

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Add the wall-clock time of the ``with`` block to an activity."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(activity, time.perf_counter() - start)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The totals as a JSON value; the byte counts stay whole numbers."""
        return {
            "sent": dict(self.sent),
            "received": dict(self.received),
            "spared_sent": dict(self.spared_sent),
            "spared_received": dict(self.spared_received),
            "seconds": dict(self.seconds),
        }

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Restore totals saved by :meth:`state_dict`."""
        self.sent = _whole(state["sent"])
        self.received = _whole(state["received"])
        # States of earlier runs have none.
        self.spared_sent = _whole(state.get("spared_sent", {}))
        self.spared_received = _whole(state.get("spared_received", {}))
        self.seconds = dict(state["seconds"])


def _whole(counts: dict[str, float]) -> Counter[str]:
    return Counter({kind: int(count) for kind, count in counts.items()})
