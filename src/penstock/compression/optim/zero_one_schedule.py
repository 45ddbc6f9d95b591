"""When 0/1 Adam updates its variance and when its replicas talk: pure functions of the step.

Both follow the policies of the paper (Lu, Li, Zhang, De Sa, He, "Maximizing communication efficiency for large-scale
training via 0/1 Adam", ICLR 2023, arXiv:2202.06009, section 6) in DeepSpeed's form, with its names.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ZeroOneSchedule:
    """The steps, counted from 1.

    Attributes:
        var_freeze_step: The last step at which the variance may be updated; usually the end of the rate's warm-up.
        var_update_scaler: The interval between updates of the variance doubles after so many of them (kappa).
        local_step_scaler: Once the variance is frozen, the interval between exchanges doubles after so many steps.
        local_step_clipper: The largest interval between exchanges (H).

    Raises:
        ValueError: One of them is not positive.
    """

    var_freeze_step: int = 100_000
    var_update_scaler: int = 16
    local_step_scaler: int = 32_678
    local_step_clipper: int = 16

    def __post_init__(self) -> None:
        for name in ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def updates_variance(self, step: int) -> bool:
        """Whether the variance takes in the gradient of a step, which is then exchanged uncompressed."""
        return self.variance_updates(step) > self.variance_updates(step - 1)

    def variance_updates(self, step: int) -> int:
        """How many updates the variance has had after a step.

        In phase ``p`` they come at the multiples of ``2**p``, ``var_update_scaler`` of them.
        """
        last = min(step, self.var_freeze_step)
        done, phase_start, interval = 0, 0, 1
        while True:
            here = last // interval - phase_start // interval
            if here < self.var_update_scaler:
                return done + max(0, here)
            done += self.var_update_scaler
            phase_start = interval * (phase_start // interval + self.var_update_scaler)
            interval *= 2

    def exchanges(self, step: int) -> bool:
        """Whether the replicas exchange anything at a step."""
        return step % self.interval(step) == 0

    def interval(self, step: int) -> int:
        """Steps between exchanges around a step: 1 until the variance is frozen."""
        frozen_for = step - self.var_freeze_step
        if frozen_for <= 0:
            return 1
        doublings = (frozen_for - 1) // self.local_step_scaler
        # Python's integers have no end, but nobody needs 2 ** (a million) to be clipped to 16.
        return min(self.local_step_clipper, 1 << min(doublings, self.local_step_clipper.bit_length()))
