"""What is known of a layer without keeping it."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """A layer's type and parameters.

    Attributes:
        module_type: The module's class.
        parameters: For each parameter, its shape, dtype and whether it is frozen, as text.
        trainable: Elements of all parameters that take gradients.
    """

    module_type: type[nn.Module]
    parameters: dict[str, str]
    trainable: int

    @classmethod
    def of(cls, module: nn.Module) -> "LayerFacts":
        """The facts of a module, which may lie on the meta device."""
        named = dict(module.named_parameters())
        return cls(
            module_type=type(module),
            parameters={
                name: f"{tuple(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}" for name, p in named.items()
            },
            trainable=sum(p.numel() for p in named.values() if p.requires_grad),
        )
