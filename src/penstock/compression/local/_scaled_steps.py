"""A replica's own optimizer under a GradScaler, whose hooks are to count every step."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock.compression.grad_scaler import gradient_scale, overflowed


class ScaledSteps:
    """Has a ``torch.amp.GradScaler`` call an optimizer at every step, those that overflow too.

    Otherwise a replica that overflows would count one step less than the others and meet them no more. A step whose
    gradients overflowed here is made without gradients, with which torch's optimizers leave parameters and states as
    they are. Optimizers that support a GradScaler by themselves (``fused=True``) are called anyway, and left alone.

    Args:
        optimizer: The inner optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._ours = False
        self._told: dict[str, Tensor | None] = {}
        self._taken: list[tuple[nn.Parameter, Tensor]] = []

    def attach(self) -> None:
        """From here on a GradScaler always calls the step."""
        if not getattr(self._optimizer, "_step_supports_amp_scaling", False):
            self._optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
            self._ours = True

    def detach(self) -> None:
        """The optimizer is as it was."""
        if self._ours:
            del self._optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
            self._ours = False

    def before_step(self) -> None:
        """Take the scale off the gradients, or the gradients away for this step.

        Raises:
            ValueError: A gradient is in float16: without the scale much of it would be zero.
        """
        if not self._ours or not hasattr(self._optimizer, "found_inf"):
            return
        gradients = [
            (parameter, parameter.grad)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        scale = gradient_scale(self._optimizer)
        if overflowed(self._optimizer, None, alone=True):
            self._taken = gradients
            for parameter, _ in gradients:
                parameter.grad = None
        elif scale is not None:
            if any(gradient.dtype == torch.float16 for _, gradient in gradients):
                raise ValueError(
                    "a GradScaler cannot take its scale off gradients in float16; keep the parameters in float32 under "
                    "torch.autocast, or train in bfloat16 without a GradScaler"
                )
            for _, gradient in gradients:
                gradient.div_(scale.to(gradient.device))
        # Most optimizers refuse to be told what is already dealt with.
        for name in ("found_inf", "grad_scale"):
            self._told[name] = getattr(self._optimizer, name)
            delattr(self._optimizer, name)

    def after_step(self) -> None:
        """Put back what was taken: the gradients, and what the scaler wants to delete itself."""
        for name, value in self._told.items():
            setattr(self._optimizer, name, value)
        for parameter, gradient in self._taken:
            parameter.grad = gradient
        self._told, self._taken = {}, []
