"""Which of a stage's parameters are its own, and which other stages hold copies of."""

from dataclasses import dataclass

from torch import nn

from penstock.pipe.local_stages import AnyStages
from penstock.pipe.module import PipelineModule


@dataclass(frozen=True)
class SharedParameters:
    """A stage's parameters by canonical name.

    Attributes:
        own: On one stage alone.
        shared: Copies of weights that are tied to layers of other stages.
        counted_here: All of ``own``, and those of ``shared`` whose owner (the first layer of the tie) lies here: over
            the stages of a pipeline every weight of the model once.
        names: From ``id(parameter)`` to its canonical name.
    """

    own: list[tuple[str, nn.Parameter]]
    shared: list[tuple[str, nn.Parameter]]
    counted_here: list[nn.Parameter]
    names: dict[int, str]

    @classmethod
    def of(cls, stage: AnyStages, module: PipelineModule | None) -> "SharedParameters":
        """Sort the parameters of a rank's stages; ``module`` is None for a plain model, which shares nothing."""
        local = {index for index, _ in stage.canonical_modules()}
        spread: set[str] = set()
        elsewhere: set[str] = set()
        for key, named in stage.tied.items():
            layers = () if module is None else module.tied[key]
            if module is not None and len({module.stage_of(layer) for layer in layers}) > 1:
                spread.update(name for name, _ in named)
                if layers[0] not in local:
                    elsewhere.update(name for name, _ in named)
        everything = list(stage.canonical_parameters())
        # Two stages of this rank may each hold a copy: under one name, and to be counted once.
        once = {name: parameter for name, parameter in reversed(everything) if name not in elsewhere}
        return cls(
            own=[(name, parameter) for name, parameter in everything if name not in spread],
            shared=sorted(((n, p) for n, p in everything if n in spread), key=lambda pair: pair[0]),
            counted_here=list(reversed(once.values())),
            names={id(parameter): name for name, parameter in everything},
        )
