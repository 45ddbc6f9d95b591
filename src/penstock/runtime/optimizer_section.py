"""The configuration of the optimizer."""

import inspect
from typing import Any, Final, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn
from torch.optim import Optimizer

from penstock._core.suggest import unknown_name
from penstock.compression import DeMo, MuonAdamW, OneBitAdam, OneBitLamb, ParameterRules, ZeroOneAdam
from penstock.runtime.config_sections import Section, one_of

_CLASSES: Final[dict[str, type[Optimizer]]] = {
    "adamw": torch.optim.AdamW,
    "demo": DeMo,
    "muon": MuonAdamW,
    "onebit_adam": OneBitAdam,
    "onebit_lamb": OneBitLamb,
    "zero_one_adam": ZeroOneAdam,
}
OPTIMIZERS: Final = tuple(_CLASSES)
_OWNS_EXCHANGE: Final = frozenset({"demo", "onebit_adam", "onebit_lamb", "zero_one_adam"})
"""Optimizers that communicate over the replicas themselves, so that no averaged gradient exists."""
_HAS_RULES: Final = frozenset({"onebit_adam", "onebit_lamb", "zero_one_adam"})
_FREEZES: Final = frozenset({"onebit_adam", "onebit_lamb"})
_SET_BY_THE_RUN: Final = {
    "self": None,
    "params": "the model",
    "lr": "optimizer.lr",
    "betas": "optimizer.betas",
    "eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
    "freeze_step": "optimizer.freeze_step",
    "rules": "optimizer.full_precision and optimizer.min_dimensions",
    "masks": "what makes an optimizer of one's own, initialize(optimizer=...)",
    "group": "data_parallel",
    "meter": "the run",
    "watcher": "the run",
}


class OptimizerSection(Section):
    """The optimizer, when no optimizer object is given.

    Attributes:
        name: ``adamw``; ``muon`` (with AdamW for what is no hidden matrix); or one that exchanges compressed momentum
            itself: ``onebit_adam``, ``zero_one_adam``, ``onebit_lamb``, ``demo``.
        lr: Peak learning rate.
        betas: Decay rates of the two moments, each in ``[0, 1)``.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        freeze_step: Steps of warm-up after which ``onebit_adam`` and ``onebit_lamb`` freeze the second moment.
        full_precision: Patterns of parameter names whose momentum goes uncompressed, for example ``["*embed*"]``; for
            ``onebit_adam``, ``zero_one_adam`` and ``onebit_lamb``.
        min_dimensions: For these, parameters with fewer axes go uncompressed: 2 leaves out norms and biases.
        gradient_clipping: Largest global norm of the gradient; None does not clip.
        post_validation: Whether to step before the gradient's global norm is known, and to take the step back where it
            was wrong; for ``adamw`` under a pipeline. The result is the same.
        options: The optimizer's other keyword arguments, for example ``{var_update_scaler: 16}``.
    """

    name: str = "adamw"
    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    freeze_step: int | None = Field(default=None, ge=1)
    full_precision: list[str] = Field(default_factory=list)
    min_dimensions: int = Field(default=0, ge=0)
    gradient_clipping: float | None = Field(default=None, gt=0)
    post_validation: bool = False
    options: dict[str, Any] = Field(default_factory=dict)

    _known_name = field_validator("name")(one_of("optimizer", OPTIMIZERS))

    @property
    def owns_exchange(self) -> bool:
        """Whether the optimizer communicates over the replicas itself."""
        return self.name in _OWNS_EXCHANGE

    @property
    def rules(self) -> ParameterRules | None:
        """Which parameters' momentum goes uncompressed; None if all is compressed."""
        if not self.full_precision and not self.min_dimensions:
            return None
        return ParameterRules(tuple(self.full_precision), self.min_dimensions)

    def create(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer over parameter groups, of named parameters if there are :attr:`rules`."""
        arguments: dict[str, Any] = {"lr": self.lr}
        if self.name != "demo":
            arguments |= {"betas": self.betas, "eps": self.eps}
        if self.freeze_step is not None:
            arguments["freeze_step"] = self.freeze_step
        if self.rules is not None:
            arguments["rules"] = self.rules
        return _CLASSES[self.name](groups, **arguments, **self.options)

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas={list(self.betas)}: each must lie in [0, 1)")
        for key in {"betas", "eps"} & self.model_fields_set if self.name == "demo" else ():
            raise ValueError(f"{key} has no meaning for demo, which has no second moment; remove it")
        freezes = self.name in _FREEZES
        if freezes and self.freeze_step is None:
            raise ValueError(
                f"{self.name} needs freeze_step, the number of uncompressed warm-up steps before the second moment "
                "freezes; 15 to 25 % of the run is usual"
            )
        if not freezes and self.freeze_step is not None:
            instead = "options: {var_freeze_step: ...}" if self.name == "zero_one_adam" else "name: onebit_adam"
            raise ValueError(
                f"freeze_step={self.freeze_step} has no meaning for {self.name}; remove it, or take {instead}"
            )
        if self.rules is not None and self.name not in _HAS_RULES:
            given = f"full_precision={self.full_precision} and min_dimensions={self.min_dimensions}"
            raise ValueError(
                f"optimizer.{given} say whose momentum goes uncompressed, but {self.name} "
                + ("sends a part of each only" if self.owns_exchange else "sends none")
                + "; remove them"
                + ("" if self.owns_exchange else ", or set them in the section compression, for gradients")
            )
        if self.owns_exchange and self.gradient_clipping is not None:
            raise ValueError(
                f"gradient_clipping={self.gradient_clipping:g} needs the averaged gradient, and {self.name} exchanges "
                "momentum, so none exists; remove gradient_clipping, or take name: adamw with compression.algorithm"
            )
        if self.post_validation and self.name != "adamw":
            raise ValueError(
                f"post_validation takes steps of adamw back, but name is {self.name}; take name: adamw, or "
                "post_validation: false"
            )
        self._check_options()
        return self

    def _check_options(self) -> None:
        if not self.options:
            return
        known = list(inspect.signature(_CLASSES[self.name]).parameters)
        for key in self.options:
            if _SET_BY_THE_RUN.get(key) is not None:
                raise ValueError(f"options: {key} is set from {_SET_BY_THE_RUN[key]}; remove it here")
            if key not in known:
                raise ValueError(
                    unknown_name(f"option of {self.name}:", key, [k for k in known if k not in _SET_BY_THE_RUN])
                )
        self.create([{"params": [("any", nn.Parameter(torch.zeros(1)))]}])  # refuses values that are out of range
