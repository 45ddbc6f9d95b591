"""The loop and its parts: a loader over a dataset, a model trained, evaluated or asked, results saved."""

from penstock.data_pipeline.components import register_components
from penstock.data_pipeline.configuration import apply_overrides, read_mapping, validate_config
from penstock.data_pipeline.execute import execute_data_pipeline
from penstock.data_pipeline.loader import create_data_loader, process_dataset, setup_sampler
from penstock.data_pipeline.pipeline import PreparedModule, initialize_model, initialize_module, run_pipeline
from penstock.data_pipeline.results import load_weights, process_and_save_results, save_weights
from penstock.data_pipeline.settings import LoaderConfig, PipelineConfig, TrainingConfig, load_configuration
from penstock.data_pipeline.steps import (
    NonFiniteLossError,
    compute_loss,
    configure_globals,
    optimize_model,
    set_model_mode,
    setup_logging,
)

__all__ = [
    "LoaderConfig",
    "NonFiniteLossError",
    "PipelineConfig",
    "PreparedModule",
    "TrainingConfig",
    "apply_overrides",
    "compute_loss",
    "configure_globals",
    "create_data_loader",
    "execute_data_pipeline",
    "initialize_model",
    "initialize_module",
    "load_configuration",
    "load_weights",
    "optimize_model",
    "process_and_save_results",
    "process_dataset",
    "read_mapping",
    "register_components",
    "run_pipeline",
    "save_weights",
    "set_model_mode",
    "setup_logging",
    "setup_sampler",
    "validate_config",
]
