"""The configuration of local updates: replicas that train apart and meet now and then."""

from typing import Any, Final, Self

from pydantic import Field, field_validator, model_validator

from penstock.compression import DiLoCo, LocalSGD, LocalUpdates, MuLoCo, SparseLoCo, StreamingDiLoCo
from penstock.compression.registry import create_compression_algorithm
from penstock.runtime.config_sections import Section, one_of

_METHODS: Final[dict[str, type[LocalUpdates]]] = {
    "local_sgd": LocalSGD,
    "diloco": DiLoCo,
    "streaming_diloco": StreamingDiLoCo,
    "muloco": MuLoCo,
    "sparseloco": SparseLoCo,
}
_NOT_TAKEN: Final = {
    "local_sgd": ("outer_lr", "outer_momentum", "nesterov"),
    "sparseloco": ("outer_momentum", "nesterov"),
}
"""Keys of the outer step that a method has not."""
_STREAMING_FRAGMENTS: Final = 4


class LocalUpdatesSection(Section):
    """Replicas train apart and exchange how far they have come every ``period`` steps.

    Keys that are left out take the method's own defaults: see its class in :mod:`penstock.compression`.

    Attributes:
        method: ``local_sgd``, ``diloco``, ``streaming_diloco``, ``muloco`` (with ``optimizer.name: muon``) or
            ``sparseloco``.
        period: Optimizer steps between two exchanges of the same parameters.
        outer_lr: Outer learning rate; not for ``local_sgd``.
        outer_momentum: Outer momentum; not for ``local_sgd`` and ``sparseloco``.
        nesterov: Whether outer momentum looks ahead.
        algorithm: Compressor of the ways, by its registered name; ``none`` sends them as they are.
        options: The algorithm's options.
        error_feedback: Whether what compression loses is added to the next exchange.
        error_decay: What is carried over is multiplied by this.
        fragments: Parts of the model that take turns.
        overlap: Steps from sending a fragment to receiving it.
        mixing: How much of its own parameters a replica keeps when it receives.
        bucket_mb: Size of a bucket in MiB of parameters.
    """

    method: str
    period: int = Field(ge=1)
    outer_lr: float | None = Field(default=None, gt=0)
    outer_momentum: float | None = Field(default=None, ge=0, lt=1)
    nesterov: bool | None = None
    algorithm: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    error_feedback: bool = True
    error_decay: float | None = Field(default=None, gt=0, le=1)
    fragments: int | None = Field(default=None, ge=1)
    overlap: int | None = Field(default=None, ge=0)
    mixing: float | None = Field(default=None, ge=0, lt=1)
    bucket_mb: float = Field(default=25.0, gt=0)

    _known_method = field_validator("method")(one_of("method of local updates", tuple(_METHODS)))

    @property
    def number_of_fragments(self) -> int:
        """Fragments, given or the method's own."""
        if self.fragments is not None:
            return self.fragments
        return _STREAMING_FRAGMENTS if self.method == "streaming_diloco" else 1

    @property
    def given(self) -> dict[str, Any]:
        """Keyword arguments for the method: those that were given."""
        names = ("outer_lr", "outer_momentum", "nesterov", "error_decay", "overlap", "mixing")
        result: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.algorithm is not None:
            result["algorithm"] = create_compression_algorithm(self.algorithm, self.options)
        return result

    @property
    def method_class(self) -> type[LocalUpdates]:
        """The class of the method."""
        return _METHODS[self.method]

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for name in _NOT_TAKEN.get(self.method, ()):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no meaning for {self.method}; remove it, or take method: diloco")
        if self.options and self.algorithm is None:
            raise ValueError("options are those of the algorithm; name it: algorithm: ...")
        lossless = self.algorithm is not None and create_compression_algorithm(self.algorithm, self.options).lossless
        if self.error_decay is not None and (lossless or not self.error_feedback):
            because = f"algorithm: {self.algorithm} leaves nothing over" if lossless else "error_feedback is false"
            raise ValueError(
                f"error_decay={self.error_decay:g} is of what compression leaves over, but {because}; remove it"
            )
        return self
