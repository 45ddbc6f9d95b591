"""The configuration of a data pipeline, and how it is loaded.

Example (YAML)::

    globals: {seed: 1234, threads: 2}
    data:
      dataset: corpus/train
      length: 256
      data_loader_params: {batch_size: 16, shuffle: true}
    model:
      name: "mylib.models:make_model"
      args: {hidden_size: 128}
    training:
      mode: train
      max_steps: 100
      loss_fn: token_cross_entropy
      optimizer: {name: adamw, lr: 1e-3}
    results: {path: out/results.jsonl, weights: out/model.safetensors}
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from penstock.data_pipeline.configuration import apply_overrides, read_mapping, validate_config

Mode = Literal["train", "eval", "predict"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class LoaderConfig(_Section):
    """How a dataset becomes batches; see :func:`penstock.data_pipeline.create_data_loader`.

    Attributes:
        length: Cut a stream of tokens into windows of ``length + 1``.
        stride: Tokens between the starts of windows; ``length`` unless given.
        column: Which column of a table.
        transform: A callable, a registered name, ``{"name": ..., **arguments}``, or a list of these, applied to every
            sample in order.
        collate: What makes a batch of samples: a callable, a name (``tokens``), ``{"name": ..., **arguments}``, or
            ``default`` for torch's own. Unless given, tokens are collated as tokens and all else by torch.
        sampling: Configuration of a :class:`DataSampler` that decides which samples come in which order.
        seed: Seeds the order of ``shuffle: true`` and the workers. None leaves them to torch's global generator.
        data_loader_params: Passed to :class:`torch.utils.data.DataLoader`.
    """

    length: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)
    column: str | None = None
    transform: Any = None
    collate: Any = None
    sampling: dict[str, Any] | None = None
    seed: int | None = None
    data_loader_params: dict[str, Any] = Field(default_factory=dict)


class DataSection(LoaderConfig):
    """The data of a configured pipeline.

    Attributes:
        dataset: A path, a registered name or import path (``package.module:attribute``), or ``{"name": ...,
            **arguments}`` of either. A registered name wins over a file of the same name.
    """

    dataset: Any


class GlobalsSection(_Section):
    """What holds for the whole process.

    Attributes:
        seed: Seeds Python's, NumPy's and torch's global generators.
        threads: Threads of torch's CPU operators; None leaves torch's choice.
        device: Where the model runs: ``cpu``, ``cuda``, ``cuda:1``.
    """

    seed: int = Field(default=1234, ge=0, lt=2**32)
    threads: int | None = Field(default=None, ge=1)
    device: str = "cpu"


class LoggingSection(_Section):
    """Where progress is told.

    Attributes:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        file: Also append to this file.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    file: str | None = None


class ModelSection(_Section):
    """Which model.

    Attributes:
        name: A registered name or an import path ``package.module:attribute`` of something that makes a model.
        args: Passed to it.
        weights: A safetensors file to load into the model, which must name exactly the model's own tensors.
    """

    name: str
    args: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None


class TrainingConfig(_Section):
    """What to do with the model; see :func:`penstock.data_pipeline.execute_data_pipeline`.

    Attributes:
        mode: ``train``, ``eval`` or ``predict``.
        epochs: Passes over the loader. 1 if neither this nor ``max_steps`` is given.
        max_steps: Stop after this many steps; alone, the loader is started anew until they are done.
        optimizer: For ``train`` over an ``nn.Module``: an instance, a factory over parameters, or ``{"name": "adamw",
            "lr": 1e-3}``.
        loss_fn: ``loss_fn(outputs, targets)``: a callable, a name, or ``{"name": ..., **arguments}``. None if the model
            itself returns its loss.
        device: Where an ``nn.Module`` and its batches are moved; None leaves the model where it is.
        gradient_accumulation_steps: Batches whose mean loss makes one optimizer step.
        max_grad_norm: Clip the gradient's global norm to this before each step.
        log_every: Log every so many steps; 0 never.
        callbacks: Each is called with every step's result, as soon as there is one.
    """

    mode: Mode = "train"
    epochs: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    optimizer: Any = None
    loss_fn: Any = None
    device: Any = None
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_grad_norm: float | None = Field(default=None, gt=0)
    log_every: int = Field(default=0, ge=0)
    callbacks: list[Callable[[dict[str, Any]], Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.mode != "train":
            for name in ("optimizer", "max_grad_norm"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no meaning in {self.mode} mode, which changes no weights; remove it")
            if self.gradient_accumulation_steps != 1:
                raise ValueError(f"gradient_accumulation_steps has no meaning in {self.mode} mode; remove it")
        if self.mode == "predict" and self.loss_fn is not None:
            raise ValueError("loss_fn has no meaning in predict mode, which computes no loss; remove it or use eval")
        return self


class ResultsSection(_Section):
    """What is kept.

    Attributes:
        path: The steps' results, ``.jsonl`` or ``.json``.
        weights: Where the trained model's tensors go (``.safetensors``).
    """

    path: str | None = None
    weights: str | None = None

    @model_validator(mode="after")
    def _check_suffixes(self) -> Self:
        # Now, not when the training is over.
        for name, value, suffixes in (
            ("path", self.path, (".jsonl", ".json")),
            ("weights", self.weights, (".safetensors",)),
        ):
            if value is not None and not value.endswith(suffixes):
                raise ValueError(f"{name}={value!r} must end in {' or '.join(suffixes)}")
        return self


class PipelineConfig(_Section):
    """Everything that ``python -m penstock.data_pipeline CONFIG`` needs.

    Attributes:
        components: For each kind, names and import paths; see :func:`penstock.data_pipeline.register_components`.
        globals: Seed, threads, device.
        logging: Where progress is told.
        data: Dataset and loader.
        model: The model.
        training: What to do.
        results: What to keep.
    """

    components: dict[str, dict[str, str]] = Field(default_factory=dict)
    globals: GlobalsSection = Field(default_factory=GlobalsSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    data: DataSection
    model: ModelSection
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    results: ResultsSection = Field(default_factory=ResultsSection)

    @model_validator(mode="after")
    def _check_results(self) -> Self:
        if self.results.weights is not None and self.training.mode != "train":
            raise ValueError(f"results.weights has no meaning in {self.training.mode} mode, which changes no weights")
        return self


def load_configuration(
    source: str | os.PathLike[str] | Mapping[str, Any] | PipelineConfig, overrides: Iterable[str] = ()
) -> PipelineConfig:
    """Load and check a pipeline's configuration.

    Args:
        source: A YAML or JSON file, or the same as a dictionary.
        overrides: Settings that win over the source, such as ``training.max_steps=10``.

    Raises:
        ValueError: The file or a setting is wrong; each problem is named by its place, unknown keys with the nearest.
    """
    changes = list(overrides)
    if isinstance(source, PipelineConfig):
        if not changes:
            return source
        data: Mapping[str, Any] = {name: _plain(getattr(source, name)) for name in source.model_fields_set}
        name = "configuration"
    elif isinstance(source, Mapping):
        data, name = source, "configuration"
    else:
        data, name = read_mapping(source), os.fspath(source)
    return validate_config(PipelineConfig, apply_overrides(data, changes), name)


def _plain(section: Any) -> Any:
    if isinstance(section, BaseModel):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return section
