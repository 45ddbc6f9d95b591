"""What is done with the average of the replicas' ways."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class OuterStep:
    """SGD on the pseudo-gradient: the way back from where the replicas went, on average, to where they started.

    As in Douillard et al., "DiLoCo: distributed low-communication training of language models", 2023
    (arXiv:2311.08105), it is ``torch.optim.SGD`` with Nesterov momentum. A rate of 1 without momentum is plain
    averaging.

    Attributes:
        lr: Outer learning rate.
        momentum: In [0, 1).
        nesterov: Look ahead along the momentum; without effect where there is none.

    Raises:
        ValueError: A value is out of range.
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = True

    def __post_init__(self) -> None:
        if not self.lr > 0.0:
            raise ValueError(f"outer_lr must be positive, got {self.lr}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"outer_momentum must be in [0, 1), got {self.momentum}")

    @property
    def is_average(self) -> bool:
        """Whether the replicas' average is taken as it is."""
        return self.lr == 1.0 and self.momentum == 0.0

    def apply_(self, anchor: Tensor, way: Tensor, momentum: Tensor | None) -> None:
        """Move the anchor, in place.

        Args:
            anchor: Where the replicas started, flat.
            way: The pseudo-gradient ``anchor - mean of the replicas``; only read.
            momentum: Updated in place; None without momentum.
        """
        if momentum is None:
            anchor.add_(way, alpha=-self.lr)
            return
        momentum.mul_(self.momentum).add_(way)
        if self.nesterov:
            anchor.add_(way.add(momentum, alpha=self.momentum), alpha=-self.lr)
        else:
            anchor.add_(momentum, alpha=-self.lr)
