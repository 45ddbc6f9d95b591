"""Which of a stage's parameters are its own, and which other stages hold copies of."""

from dataclasses import dataclass

from torch import nn

from penstock.pipe.module import PipelineModule
from penstock.pipe.stage import Stage


@dataclass(frozen=True)
class SharedParameters:
    """A stage's parameters by canonical name.

    Attributes:
        own: On this stage alone.
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
    def of(cls, stage: Stage, module: PipelineModule | None) -> "SharedParameters":
        """Sort the parameters of a stage; ``module`` is None for a plain model, which shares nothing."""
        spread = set()
        owned = set()
        if module is not None and module.num_stages is not None and module.num_stages > 1:
            for key, layers in module.tied.items():
                if len({module.stage_of(layer) for layer in layers}) > 1:
                    spread.add(key)
                    if module.stage_of(layers[0]) == stage.index:
                        owned.add(key)
        shared = [pair for key, pairs in sorted(stage.tied.items()) if key in spread for pair in pairs]
        elsewhere = {
            id(parameter)
            for key, pairs in stage.tied.items()
            if key in spread and key not in owned
            for _, parameter in pairs
        }
        copies = {id(parameter) for _, parameter in shared}
        everything = list(stage.canonical_parameters())
        return cls(
            own=[(name, parameter) for name, parameter in everything if id(parameter) not in copies],
            shared=shared,
            counted_here=[parameter for _, parameter in everything if id(parameter) not in elsewhere],
            names={id(parameter): name for name, parameter in everything},
        )
