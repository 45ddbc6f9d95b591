"""The whole pipeline from one configuration: prepare the process, build, run, save."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from penstock._core.protocols import BatchEngine
from penstock.data_pipeline.components import call, find_component, is_registered, register_components, split_spec
from penstock.data_pipeline.configuration import validate_config
from penstock.data_pipeline.execute import Result, execute_data_pipeline
from penstock.data_pipeline.loader import create_data_loader
from penstock.data_pipeline.results import load_weights, process_and_save_results, save_weights
from penstock.data_pipeline.settings import (
    DataSection,
    LoaderConfig,
    ModelSection,
    PipelineConfig,
    load_configuration,
)
from penstock.data_pipeline.steps import configure_globals, setup_logging


@dataclass(frozen=True, slots=True)
class PreparedModule:
    """What :func:`initialize_module` made ready.

    Attributes:
        config: The checked configuration.
        device: Where the model is to run.
        logger: Where progress is told.
    """

    config: PipelineConfig
    device: torch.device
    logger: logging.Logger


def initialize_module(config: PipelineConfig | Mapping[str, Any]) -> PreparedModule:
    """Make the process ready for a pipeline: logging, seeds, threads, device, and the configured components' names.

    Raises:
        ValueError: The configuration is wrong, a component cannot be imported, or there is no such device.
    """
    checked = load_configuration(config)
    logger = setup_logging(checked.logging.level, checked.logging.file)
    device = configure_globals(checked.globals.seed, checked.globals.threads, checked.globals.device)
    register_components(checked.components, replace=True)
    return PreparedModule(checked, device, logger)


def initialize_model(config: ModelSection | Mapping[str, Any] | str) -> nn.Module | BatchEngine:
    """Make a model, and load its weights where a file is named.

    Args:
        config: A name, or a :class:`ModelSection` (also as a dictionary): ``name`` (registered, or an import path
            ``package.module:attribute``), ``args`` and ``weights``.

    Raises:
        ValueError: The name or an argument is unknown, what was made is no model, or the weights are another model's.
    """
    data = {"name": config} if isinstance(config, str) else config
    section = validate_config(ModelSection, data, "model configuration")
    model: Any = call("model", find_component("model", section.name), **section.args)
    if not isinstance(model, nn.Module | BatchEngine):
        raise ValueError(f"model {section.name!r} made a {type(model).__name__}, not a torch.nn.Module or an engine")
    if section.weights is not None:
        if not isinstance(model, nn.Module):
            raise ValueError("model.weights: an engine loads its own checkpoints")
        load_weights(model, section.weights)
    made: nn.Module | BatchEngine = model
    return made


def initialize_dataset(section: DataSection) -> Any:
    """The dataset that a configuration names: a path as it is, or what a named factory makes.

    Raises:
        ValueError: The name or an argument is unknown.
    """
    spec = section.dataset
    if isinstance(spec, Mapping) or (isinstance(spec, str) and (":" in spec or is_registered("dataset", spec))):
        factory, arguments = split_spec("dataset", spec)
        return call("dataset", factory, **arguments)
    return spec


def run_pipeline(config: PipelineConfig | Mapping[str, Any]) -> list[Result]:
    """Load, build, execute, save: what ``python -m penstock.data_pipeline CONFIG`` does.

    Returns:
        The results of :func:`execute_data_pipeline`.
    """
    prepared = initialize_module(config)
    checked = prepared.config
    model = initialize_model(checked.model)
    training = checked.training
    if isinstance(model, BatchEngine):
        _check_for_engine(checked)
    elif training.device is None:
        training = training.model_copy(update={"device": prepared.device})
    fields = {name: getattr(checked.data, name) for name in checked.data.model_fields_set - {"dataset"}}
    loader_config = validate_config(LoaderConfig, {"seed": checked.globals.seed} | fields, "data")
    loader = create_data_loader(initialize_dataset(checked.data), loader_config)
    results = execute_data_pipeline(model, loader, training)
    if checked.results.path is not None:
        process_and_save_results(results, checked.results.path)
        prepared.logger.info("%d results in %s", len(results), checked.results.path)
    if checked.results.weights is not None:
        assert isinstance(model, nn.Module)  # checked above
        save_weights(model, checked.results.weights)
        prepared.logger.info("weights in %s", checked.results.weights)
    return results


def _check_for_engine(config: PipelineConfig) -> None:
    if config.results.weights is not None:
        raise ValueError("results.weights: an engine saves its own checkpoints; remove it")
    if "device" in config.globals.model_fields_set:
        raise ValueError("globals.device: an engine has its own device; set it where the engine is made")
