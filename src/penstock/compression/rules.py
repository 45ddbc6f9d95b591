"""Which parameters are compressed and which go in full precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor

P = TypeVar("P", bound=Tensor)


@dataclass(frozen=True)
class ParameterRules:
    """Parameters that go in full precision: few bytes, or gradients that compression serves badly.

    Attributes:
        full_precision: Patterns of names, as of files: ``"*norm*"``, ``"*.bias"``, ``"embedding.*"``.
        min_dimensions: Parameters with fewer axes go in full precision: 2 leaves out norms and biases.
    """

    full_precision: tuple[str, ...] = ()
    min_dimensions: int = 0

    def compresses(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is compressed."""
        if parameter.dim() < self.min_dimensions:
            return False
        return not any(fnmatchcase(name, pattern) for pattern in self.full_precision)


def split_by(
    rules: ParameterRules | None, named: Sequence[tuple[str, P]]
) -> tuple[list[tuple[str, P]], list[tuple[str, P]]]:
    """Named parameters that are compressed, and those that go in full precision; without rules all are compressed."""
    compressed = [pair for pair in named if rules is None or rules.compresses(*pair)]
    return compressed, [pair for pair in named if rules is not None and not rules.compresses(*pair)]
