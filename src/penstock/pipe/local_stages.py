"""The stages of one pipeline rank, which may hold several, taken together."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import nn

from penstock.pipe.stage import Stage


class LocalStages(nn.Module):
    """A rank's stages with the names and layers that they have in the model; not to be called.

    Attributes:
        parts: The stages, in model order.
    """

    parts: Sequence[Stage]

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        self._held = nn.ModuleList(stages)
        object.__setattr__(self, "parts", tuple(stages))

    @property
    def index(self) -> int:
        """The first stage's number."""
        return self.parts[0].index

    @property
    def is_first(self) -> bool:
        """Whether one of them takes the batch's inputs."""
        return self.parts[0].is_first

    @property
    def is_last(self) -> bool:
        """Whether the output of one of them goes to the loss function."""
        return self.parts[-1].is_last

    @property
    def activation_checkpoint_interval(self) -> int:
        """As each stage's."""
        return self.parts[0].activation_checkpoint_interval

    @property
    def recomputed(self) -> frozenset[int]:
        """Those of all stages."""
        return frozenset().union(*(stage.recomputed for stage in self.parts))

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """As each stage's."""
        return self.parts[0].autocast_dtype

    @autocast_dtype.setter
    def autocast_dtype(self, dtype: torch.dtype | None) -> None:
        for stage in self.parts:
            stage.autocast_dtype = dtype

    def wrap_layers(self, fn: Callable[[int, nn.Module], nn.Module | None]) -> None:
        """See :meth:`Stage.wrap_layers`."""
        for stage in self.parts:
            stage.wrap_layers(fn)

    def canonical_modules(self) -> Iterator[tuple[int, nn.Module]]:
        """See :meth:`Stage.canonical_modules`."""
        return chain.from_iterable(stage.canonical_modules() for stage in self.parts)

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See :meth:`Stage.canonical_parameters`; one that two of the stages share comes once."""
        seen: set[int] = set()
        for name, parameter in chain.from_iterable(stage.canonical_parameters() for stage in self.parts):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    @property
    def tied(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """See :attr:`Stage.tied`; of several copies the first."""
        found: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for stage in self.parts:
            for key, named in stage.tied.items():
                found.setdefault(key, named)
        return found


def share_tied(stages: Sequence[Stage]) -> None:
    """Let a tied weight that several stages of a rank use be one parameter: one copy, one gradient, one state.

    Args:
        stages: Whose copies are equal; all replicas share alike.
    """
    known: dict[tuple[str, str], nn.Parameter] = {}
    for stage in stages:
        stage.share_tied(known)


AnyStages = Stage | LocalStages
"""What a rank holds: one stage, or several."""
