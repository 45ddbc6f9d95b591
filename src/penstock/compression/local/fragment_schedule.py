"""Which fragment of the model is sent and received after which step: a pure function of the step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FragmentSchedule:
    """Every fragment is sent every ``period`` steps, the fragments spread evenly over a period. ::

        period 8, 2 fragments, overlap 2      after step  1 2 3 4 5 6 7 8 9 ...
                                              fragment 0                >   <
                                              fragment 1        >   <

    As in Douillard et al., "Streaming DiLoCo with overlapping communication", 2025 (arXiv:2501.18512): fragment ``p``
    is sent (``>``) after steps that are ``p * period // fragments`` modulo the period, and received (``<``) ``overlap``
    steps later. In between, its collectives are on their way and the replicas go on.

    Attributes:
        period: Steps between two exchanges of the same fragment (H).
        fragments: How many (P).
        overlap: Steps from sending to receiving (tau); 0 waits at once.

    Raises:
        ValueError: A value is out of range, or a fragment would be sent again before it was received.
    """

    period: int
    fragments: int = 1
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period must be at least 1 step, got {self.period}")
        if not 1 <= self.fragments <= self.period:
            raise ValueError(
                f"fragments must be between 1 and period={self.period}, got {self.fragments}: each is sent after a "
                "step of its own"
            )
        if not 0 <= self.overlap < self.period:
            raise ValueError(
                f"overlap={self.overlap} must be at least 0 and less than period={self.period}: a fragment is received "
                "before it is sent again"
            )

    def sent_after(self, step: int) -> int | None:
        """The fragment that is sent after ``step`` steps, or None."""
        place = step % self.period
        for fragment in range(self.fragments):
            if fragment * self.period // self.fragments == place:
                return fragment if step > 0 else None
        return None
