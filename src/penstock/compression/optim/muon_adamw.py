"""Muon for matrices and AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any, Final, overload

import torch
from torch import nn
from torch.optim import Optimizer

_MUON: Final = "muon"


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` on the groups marked ``muon``, ``torch.optim.AdamW`` on the others.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024: hidden layers' matrices step along
    their orthogonalised momentum; embeddings, output layers, norms and biases stay with AdamW. Without marks,
    parameters of exactly two dimensions are Muon's: mark a group ``"muon": False`` for the embedding and the output
    layer. A group whose parameters are of both kinds becomes two.

    Muon's rate is adjusted to that of AdamW (``match_rms_adamw``: Liu et al., "Muon is scalable for LLM training",
    2025), so that one schedule fits both.

    Args:
        params: Parameters or parameter groups; a group may say ``muon``, ``lr``, ``weight_decay``, ``betas``, ``eps``
            and ``momentum``.
        lr: Learning rate.
        weight_decay: Decoupled.
        momentum: Muon's.
        betas: AdamW's.
        eps: AdamW's.

    Raises:
        ValueError: A group marked ``muon`` holds a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        # Each is made over a parameter of its own kind, so that torch checks the values and says what a group holds.
        matrix, vector = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))
        muon = torch.optim.Muon(
            [matrix], lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW([vector], lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        self._inner: dict[bool, Optimizer] = {True: muon, False: adamw}
        self._defaults = {kind: dict(optimizer.defaults) for kind, optimizer in self._inner.items()}
        super().__init__(_divided(params), {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of one kind, or of both (which becomes two)."""
        for group in _divided([param_group]):
            super().add_param_group({**self._defaults[group[_MUON]], **group})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, optimizer in self._inner.items():
            optimizer.param_groups = [group for group in self.param_groups if group[_MUON] is kind]
            optimizer.state = self.state
            optimizer.step()
        return loss


def _divided(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups of one kind each."""
    entries = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    result = []
    for group in groups:
        given = group["params"]
        parameters = [given] if isinstance(given, torch.Tensor) else list(given)
        mark = group.get(_MUON)
        if mark and any(parameter.dim() != 2 for parameter in parameters):
            shapes = [tuple(parameter.shape) for parameter in parameters if parameter.dim() != 2]
            raise ValueError(
                f"Muon steps matrices, but a group marked muon holds parameters of shape {shapes[:3]}; put them into a "
                "group of their own with muon=False"
            )
        matrices = [parameter for parameter in parameters if parameter.dim() == 2]
        others = [parameter for parameter in parameters if parameter.dim() != 2]
        kinds = [(bool(mark), parameters)] if mark is not None else [(True, matrices), (False, others)]
        result += [{**group, "params": members, _MUON: kind} for kind, members in kinds if members or mark is not None]
    return result
