"""Everything about a run that can be checked before a process group is made or a weight allocated."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.optim import Optimizer

from penstock.data_pipeline.data_sampling import DataSampler
from penstock.data_pipeline.data_sampling.entry_points import Progress
from penstock.data_pipeline.data_sampling.pieces import DocumentPieces
from penstock.data_pipeline.data_sampling.token_budget import TokenBudget
from penstock.data_pipeline.datasets import Corpora, PackedDocuments, TokenWindows, open_dataset
from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.pipe.module import PipelineModule
from penstock.pipe.schedule import SCHEDULES, Schedule, get_schedule
from penstock.pipe.schedule.actions import W_CODE
from penstock.pipe.tensor_parallel.plan import check_plans
from penstock.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology
from penstock.runtime.compiling import check_compiling
from penstock.runtime.config import TrainConfig, check_world, load_config
from penstock.runtime.config_checks import check_tensor_parallel
from penstock.runtime.dropping import Dropping
from penstock.runtime.feed import Feed
from penstock.runtime.lr_schedule import LRSchedule, lr_schedule
from penstock.runtime.run_directory import ORDER_NAME
from penstock.runtime.sequence_lengths import SequenceLengths


@dataclass(frozen=True)
class Prepared:
    """A run that was found to be in order.

    Attributes:
        config: The configuration, with the model's number of pipeline ranks.
        module: The model, divided into the schedule's stages; None for a plain module.
        topology: Which rank is where: the model's, if it has one.
        replicas: Data-parallel replicas.
        micro_batches: Micro-batches per replica and step.
        pipe_schedule: Which pipeline rank holds which stages, and computes what in which order.
        loss_fn: What computes the loss from output and targets; None where the model does.
        dropping: Token dropping, if any.
        dataset: The opened training data, if any.
        order: In which order it is read.
        feed: What each step reads of it.
        schedule: The learning rate's, unless a user's optimizer keeps its own.
        measured: Whether the division is to be replaced by one for which layers are measured first.
    """

    config: TrainConfig
    module: PipelineModule | None
    topology: ProcessTopology
    replicas: int
    micro_batches: int
    pipe_schedule: Schedule
    loss_fn: Callable[[Any, Any], Any] | None
    dropping: Dropping | None
    dataset: Any
    order: DataSampler | None
    feed: Feed
    schedule: LRSchedule | None
    measured: bool


def prepare(
    model: PipelineModule | nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig,
    *,
    world_size: int,
    training_data: Any = None,
    optimizer: Any = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
) -> Prepared:
    """Check a run as a whole; the arguments are those of :func:`penstock.initialize`.

    Args:
        model: The model.
        config: The configuration.
        world_size: Processes that the run has, or will have.
        training_data: The training data.
        optimizer: The optimizer or its factory.
        loss_fn: The loss function.

    Raises:
        ValueError: Something does not fit; the message has the numbers and the remedy.
    """
    settings = _divided(model, _ranked(model, load_config(config)))
    replicas = check_world(settings, world_size)
    micro_batches = settings.micro_batches(replicas)
    pipe = settings.pipe
    pipe_schedule = get_schedule(pipe.schedule, pipe.stages, micro_batches, pipe.chunks, pipe.slices)
    module = None
    if isinstance(model, PipelineModule):
        module = _recomputing(settings, model).partitioned(
            pipe.stages,
            pipe_schedule.num_stages,
            # What the configuration does not name, the model decides.
            partition_method=pipe.partition_method if "partition_method" in pipe.model_fields_set else None,
        )
    elif pipe_schedule.num_stages != 1:
        raise ValueError(
            f"schedule {pipe.schedule!r} divides the model into {pipe_schedule.num_stages} stages, but a plain "
            f"{type(model).__name__} cannot be divided; describe it as PipelineModule(layers), or take schedule '1f1b'"
        )
    measured = module is not None and module.measured
    if module is not None:
        if measured:  # until then, for what does not depend on it
            module = module.divided_by("parameters", pipe_schedule.num_stages)
        _check_stages(module)
    if pipe.activation_compression != "none" and pipe_schedule.num_ranks == 1:
        raise ValueError(
            f"pipe.activation_compression={pipe.activation_compression} is for what goes from one pipeline rank to "
            "the next, and this run has 1; set pipe.stages to 2 or more, or activation_compression: none"
        )
    if pipe.activation_compression != "none" and module is not None and module.takes_labels:
        raise ValueError(
            f"pipe.activation_compression={pipe.activation_compression} would round the terms of the loss that a "
            "vocabulary in parts sends from stage to stage; set activation_compression: none, or the model's "
            "vocabulary_parts to 1"
        )
    _check_tensor_parallel(settings, model, optimizer)
    check_compiling(settings.compile, model)
    _check_optimizer(model, optimizer, settings)
    _check_sharding(settings, pipe_schedule, optimizer)
    if pipe_schedule.slices > 1 and settings.random_ltd is not None and settings.random_ltd.enabled:
        raise ValueError(
            f"schedule {pipe_schedule.name!r} cuts sequences into {pipe_schedule.slices} slices, but random_ltd "
            "chooses among all tokens of a sequence; take '1f1b', or remove random_ltd"
        )
    _check_muon(settings, optimizer)
    dataset = open_training_data(settings, training_data)
    if measured and pipe_schedule.num_stages > 1 and dataset is None:
        raise ValueError(
            "partition_method 'profile' measures layers on the training data, of which there is none; give "
            "training_data or data.train, or another partition_method"
        )
    dropping = _dropping(settings, module)
    order = None if dataset is None else training_order(settings, dataset)
    return Prepared(
        config=settings,
        module=module,
        topology=_topology(settings, module, replicas),
        replicas=replicas,
        micro_batches=micro_batches,
        pipe_schedule=pipe_schedule,
        loss_fn=loss_fn if loss_fn is not None else getattr(module, "loss_fn", None),
        dropping=dropping,
        dataset=dataset,
        order=order,
        feed=training_feed(settings, order),
        schedule=_schedule(settings, optimizer, dropping),
        measured=measured and pipe_schedule.num_stages > 1,
    )


def splits(schedule: Schedule) -> bool:
    """Whether a schedule computes some weight gradients after the input gradients."""
    return any((actions.ops == W_CODE).any() for actions in schedule.ranks)


def _check_sharding(config: TrainConfig, schedule: Schedule, optimizer: Any) -> None:
    sharding = config.data_parallel.sharding
    if not config.data_parallel.sharded:
        return
    if config.data_parallel.reshard_after_forward and splits(schedule):
        raise ValueError(
            "data_parallel.reshard_after_forward frees a layer's gathered parameters between its passes, but schedule "
            f"{schedule.name!r} computes weight gradients then, which need them; set reshard_after_forward: false, or "
            "take a schedule with whole backward passes, such as '1f1b' or 'interleaved_1f1b'"
        )
    if schedule.slices > 1:
        raise ValueError(
            f"data_parallel.sharding={sharding} follows a layer's one way through a backward pass, but schedule "
            f"{schedule.name!r} cuts sequences into {schedule.slices} slices that look at one another; take '1f1b', or "
            "sharding: none"
        )
    if isinstance(optimizer, Optimizer):
        raise ValueError(
            f"data_parallel.sharding={sharding} replaces the model's parameters by their parts, which the given "
            f"{type(optimizer).__name__} does not hold; give a factory, such as "
            "lambda groups: torch.optim.AdamW(groups, lr=1e-3)"
        )


def _recomputing(config: TrainConfig, model: PipelineModule) -> PipelineModule:
    """The model, recomputing what the configuration says, if it says anything."""
    pipe = config.pipe
    asked = (pipe.activation_checkpoint_interval, pipe.activation_checkpoint_layers)
    given = (model.activation_checkpoint_interval, model.activation_checkpoint_layers)
    if asked in ((0, ()), given):
        return model
    if given != (0, ()):
        raise ValueError(
            f"the model was made with activation_checkpoint_interval={given[0]} and activation_checkpoint_layers="
            f"{list(given[1])}, but the configuration's pipe section says {asked[0]} and {list(asked[1])}; say it in "
            "one place"
        )
    return model.recomputing(*asked)


def _divided(model: Any, config: TrainConfig) -> TrainConfig:
    """The configuration with the size of the ``model`` axis, if the model's topology has one."""
    topology = model.topology if isinstance(model, PipelineModule) else None
    size = 0 if topology is None else topology.get_dim("model")
    if not size or size == config.tensor_parallel.size:
        return config
    if "tensor_parallel" in config.model_fields_set:
        raise ValueError(
            f"the model's topology {topology!r} has model={size}, but the configuration says "
            f"tensor_parallel.size={config.tensor_parallel.size}; make them equal, or leave one out"
        )
    section = config.tensor_parallel.model_copy(update={"size": size})
    config = config.model_copy(update={"tensor_parallel": section})
    check_tensor_parallel(config)
    return config


def _check_tensor_parallel(config: TrainConfig, model: Any, optimizer: Any) -> None:
    size = config.tensor_parallel.size
    if size == 1:
        return
    if not isinstance(model, PipelineModule):
        raise ValueError(
            f"tensor_parallel.size={size} divides layers that say how, but a plain {type(model).__name__} is one "
            "layer; describe it as PipelineModule(layers), or set tensor_parallel.size: 1"
        )
    if optimizer is not None:
        raise ValueError(
            f"tensor_parallel.size={size} gives the optimizer parts of matrices, which is known to be right for "
            "optimizer.name: adamw only; leave the optimizer argument out, or set tensor_parallel.size: 1"
        )
    check_plans(model.specs, size)


def _ranked(model: Any, config: TrainConfig) -> TrainConfig:
    """The configuration with the model's number of pipeline ranks."""
    if isinstance(model, PipelineModule):
        stages = config.pipe.stages
        given = "stages" in config.pipe.model_fields_set
        known = SCHEDULES.get(config.pipe.schedule)
        # A model may be divided by its ranks or, explicit bounds for example, by all of its stages.
        total = stages * (config.pipe.chunks or (1 if known is None else known.chunks))
        if model.num_stages is None or (given and model.num_stages == total):
            return config
        if given and model.num_stages != stages and model.topology is None:
            if known is not None or isinstance(model.partition_method, str):
                raise ValueError(
                    f"the model was divided into num_stages={model.num_stages}, but the configuration says "
                    f"pipe.stages={stages}; make them equal, or leave num_stages out"
                )
            return config
        if model.topology is not None and (given and model.num_stages != stages):
            raise ValueError(
                f"the model's topology has {model.num_stages} stages, but the configuration says pipe.stages={stages}"
            )
        pipe = config.pipe.model_copy(update={"stages": model.num_stages})
        return config.model_copy(update={"pipe": pipe})
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a PipelineModule or a torch.nn.Module, got {type(model).__name__}; "
            "wrap a list of layers as PipelineModule(layers, ...)"
        )
    if config.pipe.stages != 1:
        raise ValueError(
            f"pipe.stages={config.pipe.stages}, but a plain {type(model).__name__} cannot be divided; describe it as "
            "PipelineModule(layers, num_stages=...), or set pipe.stages: 1"
        )
    if config.random_ltd_enabled:
        raise ValueError(
            "the configuration's random_ltd section applies to a PipelineModule; for a plain module call "
            "convert_to_random_ltd(model, ...) and drive a RandomLTDScheduler yourself"
        )
    return config


def _check_stages(module: PipelineModule) -> None:
    """Refuse a division that leaves an optimizer without parameters."""
    assert module.bounds is not None
    for stage, (start, stop) in enumerate(pairwise(module.bounds)):
        if not any(module.parameter_counts[start:stop]):
            raise ValueError(
                f"stage {stage} would hold layers {start} to {stop - 1}, which have no trainable parameters, so there "
                "is nothing to optimize there; take fewer stages, or bounds that give every stage some "
                f"(trainable parameters by layer: {list(module.parameter_counts)})"
            )


def _topology(config: TrainConfig, module: PipelineModule | None, replicas: int) -> ProcessTopology:
    topology = None if module is None else module.topology
    size = config.tensor_parallel.size
    if topology is None:
        if size > 1:
            return PipeModelDataParallelTopology(num_pp=config.pipe.stages, num_mp=size, num_dp=replicas)
        return PipeDataParallelTopology(num_pp=config.pipe.stages, num_dp=replicas)
    if size > 1 and topology.get_dim("model") != size:
        raise ValueError(
            f"the model's topology {topology!r} has no axis 'model' of size {size}, which tensor_parallel.size={size} "
            "needs; leave the topology out, or take PipeModelDataParallelTopology"
        )
    for axis in topology.get_axis_names():
        if axis not in ("pipe", "data", "model") and topology.get_dim(axis) > 1:
            raise ValueError(
                f"the model's topology {topology!r} has an axis {axis!r} of size {topology.get_dim(axis)}, over which "
                "nothing is divided here; give a topology of pipe, data and model, or none"
            )
    if max(1, topology.get_dim("data")) != replicas:
        raise ValueError(
            f"the model's topology {topology!r} has data={topology.get_dim('data')}, but this run has {replicas} "
            f"replicas of {config.pipe.stages} stages; start as many processes as the topology has ranks "
            f"({topology.world_size()}), or leave the topology out"
        )
    return topology


def _check_optimizer(model: Any, optimizer: Any, config: TrainConfig) -> None:
    if optimizer is not None and config.optimizer.post_validation:
        raise ValueError(
            "optimizer.post_validation takes back steps of the configuration's adamw, but initialize was given an "
            "optimizer; leave it out (options: of the section reach AdamW), or set post_validation: false"
        )
    if isinstance(optimizer, Optimizer) and isinstance(model, PipelineModule):
        raise ValueError(
            "an optimizer instance cannot hold the parameters of a PipelineModule, which are built by initialize; "
            "give a factory instead, for example lambda groups: torch.optim.AdamW(groups, lr=1e-3)"
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer) and not callable(optimizer):
        raise ValueError(f"optimizer must be an optimizer or a factory over parameter groups, got {optimizer!r}")


def _check_muon(config: TrainConfig, optimizer: Any) -> None:
    section = config.local_updates
    if optimizer is None and section is not None and section.method == "muloco" and config.optimizer.name != "muon":
        raise ValueError(
            f"local_updates.method: muloco is DiLoCo with Muon inside, but optimizer.name is {config.optimizer.name}; "
            f"take optimizer.name: muon, or method: diloco for {config.optimizer.name}"
        )


def _dropping(config: TrainConfig, module: PipelineModule | None) -> Dropping | None:
    if not config.random_ltd_enabled:
        return None
    assert module is not None  # refused for plain models
    return Dropping(config, module)


def open_training_data(config: TrainConfig, training_data: Any = None) -> Any:
    """The training data: the object given, or what lies at the path; a corpus becomes windows or packed rows.

    A dictionary of several becomes :class:`Corpora`.
    """
    source = training_data if training_data is not None else config.data.train
    if source is None:
        return None
    if isinstance(source, Mapping):
        return Corpora({str(name): _samples(config, part) for name, part in source.items()})
    return _samples(config, source)


def _samples(config: TrainConfig, source: Any) -> Any:
    """The samples of one corpus."""
    dataset = open_dataset(source, column=config.data.column)
    if isinstance(dataset, IndexedDataset):
        length = config.sequence_length
        if length is None:
            raise ValueError(f"{source}: a token corpus needs data.sequence_length, the tokens per sample")
        if config.data.cut == "windows":
            return TokenWindows(dataset, length)
        if config.data.cut == "packed":
            return PackedDocuments(dataset, length)
        return DocumentPieces(dataset, length, "powers" if config.data.cut == "powers" else "longest")
    if config.data.cut != "windows":
        raise ValueError(f"data.cut={config.data.cut} cuts a token corpus (.bin/.idx), which {source!r} is not")
    if not len(dataset):
        raise ValueError(f"the training data holds no samples: {source!r}")
    return dataset


def training_order(config: TrainConfig, dataset: Any, *, progress: Progress | None = None) -> DataSampler:
    """In which order a run reads its training data.

    Args:
        config: The run's configuration.
        dataset: What :func:`open_training_data` returned.
        progress: Told how far the sorting of a curriculum's samples is.
    """
    sampling = {"strategy": "random", "seed": config.seed, **config.sampling}
    curriculum = sampling.get("curriculum")
    if isinstance(curriculum, Mapping) and curriculum.get("cache") is None and config.output is not None:
        # The ranks of a run, and its later starts, are to sort the samples once.
        sampling["curriculum"] = {**curriculum, "cache": str(Path(config.output) / ORDER_NAME)}
    mixture = sampling.get("mixture")
    if isinstance(mixture, Mapping) and mixture.get("by") == "tokens" and mixture.get("tokens_per_sample") is None:
        if config.sequence_length is None:
            raise ValueError("sampling.mixture changes weights by tokens; set data.sequence_length")
        sampling["mixture"] = {**mixture, "tokens_per_sample": config.sequence_length}
    order = DataSampler(dataset, {**sampling, "batch_size": config.train.global_batch_size}, progress=progress)
    if config.samples_of_run is not None:
        order.check_length(config.samples_of_run)
    return order


def training_feed(config: TrainConfig, order: DataSampler | None) -> Feed:
    """What the steps of a run read.

    Args:
        config: The run's configuration.
        order: What :func:`training_order` returned; None where the run reads no data of its own.

    Raises:
        ValueError: The batching section does not fit the data.
    """
    batching, train = config.batching, config.train
    micro_batches = train.global_batch_size // train.micro_batch_size
    budget = None
    if batching.token_budget is not None:
        if order is None:
            raise ValueError("batching.token_budget cuts the training data into steps; set data.train or training_data")
        budget = TokenBudget(
            _lengths(order.data), order.sample_at, order.epoch_size, micro_batches, config.seed, batching.token_budget
        )
    return Feed(
        train.global_batch_size,
        micro_batches,
        sizes=config.batch_sizes if batching.sizes else None,
        budget=budget,
        lengths=None
        if batching.sequence_length is None
        else SequenceLengths.of(batching.sequence_length, config.sequence_length),
        lr_scaling=batching.lr_scaling,
    )


def _lengths(dataset: Any) -> npt.NDArray[Any]:
    """Tokens of each sample as a model sees them: one less than a row has, which also gives the labels."""
    lengths = getattr(dataset, "lengths", None)
    if lengths is None:
        rows = [np.asarray(dataset[index]) for index in range(len(dataset))]
        if any(row.ndim != 1 or row.dtype.kind not in "iu" for row in rows):
            raise ValueError(
                "batching.token_budget needs samples that are rows of integer tokens; give a dataset of such rows, or "
                "one with an attribute `lengths`"
            )
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return np.asarray(lengths, dtype=np.int64) - 1


def _schedule(config: TrainConfig, optimizer: Any, dropping: Dropping | None) -> LRSchedule | None:
    """The learning rate schedule; a user's optimizer keeps its own rate unless the configuration names a schedule."""
    if optimizer is not None and "schedule" not in config.model_fields_set and not config.lr_by_deepspeeds_section:
        return None
    # Samples that are not sequences count as one token each.
    return lr_schedule(
        config,
        tokens_per_step=config.tokens_per_step or config.train.global_batch_size,
        layer_tokens=None if dropping is None else dropping.planned_layer_tokens,
    )
