"""``penstock.initialize``: from a model and a configuration to an engine."""

import datetime
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from penstock._core.meter import Meter
from penstock._core.protocols import GradientExchange, OwnsExchange
from penstock._core.sharded import here, is_sharded
from penstock._core.waiting import Watcher
from penstock.compression import (
    CompressionAlgorithm,
    LocalGradients,
    ParameterRules,
    Reducer,
    create_compression_algorithm,
    machine_groups,
)
from penstock.compression.buckets import NamedParameter
from penstock.pipe.agreement import agree
from penstock.pipe.engine import PipelineEngine
from penstock.pipe.groups import PipeGroups, tied_ranks
from penstock.pipe.local_stages import AnyStages, LocalStages, share_tied
from penstock.pipe.module import PipelineModule
from penstock.pipe.stage import Stage
from penstock.runtime.activation_codec import activation_codecs
from penstock.runtime.batches import Collate, Cut, collate_samples
from penstock.runtime.compiling import compile_layers
from penstock.runtime.config import TrainConfig
from penstock.runtime.earlier_cuts import with_cuts
from penstock.runtime.engine import Engine
from penstock.runtime.ledger_rates import Rates
from penstock.runtime.local_replicas import make_local_updates
from penstock.runtime.loss_scaler import LossScaler
from penstock.runtime.optimizers import OptimizerFactory, check_parameters, hidden_matrices, parameter_groups
from penstock.runtime.parts import Parts
from penstock.runtime.plain_model import plain_stage
from penstock.runtime.post_validation import PostValidation
from penstock.runtime.preparation import Prepared, prepare, splits
from penstock.runtime.process import Process
from penstock.runtime.run_facts import run_facts
from penstock.runtime.same_start import copy_from_first_replica
from penstock.runtime.shared_parameters import SharedParameters

if TYPE_CHECKING:  # FSDP2 takes half a second to import
    from torch.distributed.device_mesh import DeviceMesh

    from penstock.compression.sharded import CompressedReduceScatter

_log = logging.getLogger(__name__)

PARAMETER_DTYPES: Final = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bf16": torch.float32,
    "fp16": torch.float32,
}
AUTOCAST_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The watcher's own message says more than torch's, so it is to come first.
_TORCH_TIMEOUT_FACTOR = 2


def initialize(
    model: PipelineModule | nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig,
    *,
    training_data: Any = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
) -> Engine:
    """Put a model, data and an optimizer together over the processes of this run.

    Started by ``torchrun`` (or anything that sets its environment variables) every process calls this alike and gets
    its part; started alone, the one process holds everything. DDP is never used: the engine exchanges gradients itself.

    Everything that can be checked is checked before a process group is made or a weight allocated.

    Args:
        model: A :class:`penstock.pipe.PipelineModule`, or any ``nn.Module``, which is trained in place on one stage.
        config: A YAML or JSON file, a mapping, or a loaded configuration; see :class:`TrainConfig`.
        training_data: A map-style dataset or a path; None takes ``data.train`` of the configuration, if it names one.
            Datasets of token rows give inputs and labels, others must give pairs ``(inputs, targets)``.
        optimizer: A factory called with a list of parameter groups (dicts with ``params``, as torch's optimizers
            take them), or, for a plain module, an optimizer over its parameters. None builds the configuration's.
        loss_fn: ``loss_fn(output, targets)`` returns a scalar. None takes the PipelineModule's, or else expects the
            model to return the loss.

    Returns:
        The engine, with its watcher running. Use it as a context manager, or call ``close()`` at the end.

    Raises:
        ValueError: Something about the model, the configuration, the data or the number of processes does not fit; the
            message has the numbers and the remedy.
    """
    ready = prepare(
        model,
        config,
        world_size=Process.planned_world_size(),
        training_data=training_data,
        optimizer=optimizer,
        loss_fn=loss_fn,
    )
    settings, module = ready.config, ready.module
    process = Process.join(settings.deadline_s)
    watcher = Watcher(rank=process.rank, deadline_s=settings.deadline_s, store=process.store).start()
    try:
        if process.store is not None:
            agree(
                "the run",
                run_facts(settings, ready.order),
                store=process.store,
                rank=process.rank,
                world_size=process.world_size,
                watcher=watcher,
            )
        meter = Meter()
        dtype, autocast_dtype = PARAMETER_DTYPES[settings.precision], AUTOCAST_DTYPES.get(settings.precision)
        collate = partial(
            collate_samples,
            targets_needed=ready.loss_fn is not None,
            multiple_of=None if settings.batching.token_budget is None else settings.batching.token_budget.multiple_of,
        )
        if module is not None and ready.measured:
            module = _measured(module, ready, process, watcher, collate)
            assert module.bounds is not None
            settings = with_cuts(settings, module.bounds)  # so that what the run keeps says how to repeat it
        groups = PipeGroups(
            ready.topology,
            tied=None if module is None else tied_ranks(module, ready.pipe_schedule.placement),
            rank=process.rank,
            timeout=datetime.timedelta(seconds=_TORCH_TIMEOUT_FACTOR * settings.deadline_s),
            device=process.device,
            watcher=watcher,
            store=process.store,
        )
        if module is None:
            assert isinstance(model, nn.Module)
            stages = [plain_stage(model, device=process.device, dtype=dtype)]
        else:
            held = ready.pipe_schedule.stages_of(groups.pipe_rank)
            stages = [module.build_stage(index, device=process.device, dtype=dtype) for index in held]
        stage: AnyStages = stages[0] if len(stages) == 1 else LocalStages(stages)
        stage.autocast_dtype = autocast_dtype
        copy_from_first_replica(stage, groups, meter=meter, watcher=watcher)
        mesh = None
        if groups.model is not None or settings.data_parallel.sharded:
            from penstock.runtime.sharding.mesh import stage_mesh  # DTensor takes half a second to import

            mesh = stage_mesh(groups)
        if groups.model is not None:
            assert mesh is not None
            _divide(stages, groups.model, mesh["model"], meter, watcher)  # each stage its own copies
        else:
            share_tied(stages)
        # What the plain run would exchange: each replica whole, but a tensor-parallel rank its part.
        gradient_bytes = sum(here(p).nbytes for p in stage.parameters() if p.requires_grad)
        scatters = {}
        if settings.data_parallel.sharded:
            assert mesh is not None
            scatters = _shard(settings, stages, mesh["data"], meter, watcher)
        shared = SharedParameters.of(stage, module)
        if ready.dropping is not None:
            ready.dropping.wrap(stage)
            if process.rank == 0 and ready.dropping.unreached is not None:
                _log.warning(ready.dropping.unreached)
        compile_layers(settings.compile, stage, split=splits(ready.pipe_schedule))
        last_layer = None if module is None else len(module.parameter_counts) - 1
        built = _optimizer(settings, optimizer, shared, stage, last_layer=last_layer)
        local_updates = make_local_updates(settings, built, shared, groups, meter=meter, watcher=watcher)
        exchange = _exchange(settings, built, stages, scatters, shared, groups, meter, watcher)
        pipeline = PipelineEngine(
            stages,
            schedule=ready.pipe_schedule,
            micro_batches=ready.micro_batches,
            groups=groups,
            exchange=exchange,
            loss_fn=ready.loss_fn,
            watcher=watcher,
            meter=meter,
            seed=settings.seed,
            device=process.device,
            codecs=activation_codecs(settings.pipe.activation_compression),
        )
        cut = Cut(
            micro_batch_size=settings.train.micro_batch_size,
            micro_batches=ready.micro_batches,
            replica=groups.replica,
            replicas=ready.replicas,
            is_first=stage.is_first,
            is_last=stage.is_last,
            device=process.device,
            counts=groups.model_rank == 0,
            labels_enter=module is not None and module.takes_labels and ready.loss_fn is not None,
        )
        return Engine(
            Parts(
                config=settings,
                process=process,
                watcher=watcher,
                meter=meter,
                groups=groups,
                stage=stage,
                module=module,
                shared=shared,
                pipeline=pipeline,
                exchange=exchange,
                optimizer=built,
                local_updates=local_updates,
                schedule=ready.schedule,
                cut=cut,
                feed=ready.feed,
                dropping=ready.dropping,
                rates=Rates.of(
                    module, stage, ready.dropping, cut, meter, groups.num_pipe_ranks, gradient_bytes=gradient_bytes
                ),
                training_data=ready.dataset,
                order=ready.order,
                scaler=LossScaler(settings.fp16) if settings.precision == "fp16" else None,
                post_validation=_post_validation(settings, built, stage, shared, groups, meter, watcher),
                collate=collate,
            )
        )
    except BaseException as error:
        watcher.report(error)
        watcher.stop()
        raise


def _measured(
    module: PipelineModule, ready: Prepared, process: Process, watcher: Watcher, collate: Collate
) -> PipelineModule:
    """The model divided by its layers' times, measured on the first samples."""
    from penstock.runtime.profiling import divide_by_profile, profiling_groups, sample_batch

    settings = ready.config
    size = settings.train.micro_batch_size
    with profiling_groups(ready.topology, process, watcher, settings.deadline_s) as groups:
        return divide_by_profile(
            module,
            ready.pipe_schedule,
            size,
            lambda: sample_batch(ready.dataset, ready.order, size, process.device, collate),
            config=settings,
            loss_fn=ready.loss_fn,
            groups=groups,
            device=process.device,
            dtype=PARAMETER_DTYPES[settings.precision],
            autocast_dtype=AUTOCAST_DTYPES.get(settings.precision),
            watcher=watcher,
        )


def _optimizer(
    config: TrainConfig, given: Any, shared: SharedParameters, stage: AnyStages, *, last_layer: int | None
) -> Optimizer:
    if isinstance(given, Optimizer):
        built = given
    elif given is None:
        decay = config.optimizer.weight_decay
        muon = hidden_matrices(stage, last_layer=last_layer) if config.optimizer.name == "muon" else None
        named = config.optimizer.rules is not None
        groups = parameter_groups(shared.own, shared.shared, weight_decay=decay, muon=muon, named=named)
        built = config.optimizer.create(groups)
    else:
        built = given(parameter_groups(shared.own, shared.shared))
        if not isinstance(built, Optimizer):
            raise ValueError(f"the optimizer factory returned a {type(built).__name__}, not a torch.optim.Optimizer")
    check_parameters(built, stage.parameters())
    for group in built.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return built


def _post_validation(
    config: TrainConfig,
    optimizer: Optimizer,
    stage: AnyStages,
    shared: SharedParameters,
    groups: PipeGroups,
    meter: Meter,
    watcher: Watcher,
) -> PostValidation | None:
    if not config.optimizer.post_validation:
        return None
    return PostValidation(
        optimizer,
        list(stage.parameters()),
        counted=shared.counted_here,
        limit=config.optimizer.gradient_clipping,
        group=groups.pipeline,
        watcher=watcher,
        meter=meter,
    )


def _exchange(
    config: TrainConfig,
    optimizer: Optimizer,
    stages: Sequence[Stage],
    scatters: Mapping[str, "CompressedReduceScatter"],
    shared: SharedParameters,
    groups: PipeGroups,
    meter: Meter,
    watcher: Watcher,
) -> GradientExchange:
    """Who communicates gradients over the replicas: the optimizer, the reducer, or nobody."""
    if isinstance(optimizer, OwnsExchange):
        if config.compression.algorithm != "none":
            raise ValueError(
                f"compression.algorithm={config.compression.algorithm} and {type(optimizer).__name__} would both "
                "exchange gradients; set compression.algorithm: none"
            )
        if config.optimizer.gradient_clipping is not None:
            raise ValueError(
                f"optimizer.gradient_clipping needs the averaged gradient, and {type(optimizer).__name__} exchanges "
                "momentum, so none exists; remove gradient_clipping"
            )
        optimizer.bind_exchange(group=groups.replicas, replicas=groups.num_replicas, meter=meter, watcher=watcher)
        return LocalGradients(_all(shared), replicas=groups.num_replicas)
    if config.data_parallel.sharded:
        from penstock.runtime.sharding.exchange import ShardedGradients

        return ShardedGradients(stages, _whole_exchange(config, stages, groups, meter, watcher), compressed=scatters)
    if groups.num_replicas == 1 or config.local_updates is not None:
        return LocalGradients(_all(shared), replicas=groups.num_replicas)
    section = config.compression
    group, inside = groups.replicas, None
    if section.replicas_per_machine > 1:
        with watcher.waiting("making the groups of each machine"):
            inside, group = machine_groups(
                groups.topology.get_axis_comm_lists("data"),
                section.replicas_per_machine,
                backend="nccl" if groups.device.type == "cuda" else "gloo",
                timeout=groups.timeout,
            )
        groups.adopt(inside, group)
    # A bucket of its own for each shared weight: its other owners have other neighbours for it. Nor may what every
    # tensor-parallel rank holds share a scale with what it has a part of; being first, it has the same key on all.
    sets = [
        *([pair for pair in shared.own if is_sharded(pair[1]) is divided] for divided in (False, True)),
        *([pair] for pair in shared.shared),
    ]
    return _reducer(config, sets, group, meter, watcher, inside=inside)


def _reducer(
    config: TrainConfig,
    sets: Sequence[Sequence[NamedParameter]],
    group: dist.ProcessGroup | None,
    meter: Meter,
    watcher: Watcher,
    *,
    inside: dist.ProcessGroup | None = None,
) -> Reducer:
    """Compresses as the configuration says."""
    section = config.compression
    return Reducer(
        sets,
        group=group,
        inside=inside,
        algorithm=_algorithm(config),
        error_feedback=section.feedback(),
        rules=ParameterRules(tuple(section.full_precision), section.min_dimensions),
        bucket_bytes=int(section.bucket_mb * 2**20),
        warmup_steps=section.warmup_steps,
        undoable=config.precision == "fp16",
        meter=meter,
        watcher=watcher,
    )


def _algorithm(config: TrainConfig) -> CompressionAlgorithm | None:
    section = config.compression
    return None if section.algorithm == "none" else create_compression_algorithm(section.algorithm, section.options)


def _divide(
    stages: Sequence[Stage], group: dist.ProcessGroup, mesh: "DeviceMesh", meter: Meter, watcher: Watcher
) -> None:
    from penstock.pipe.tensor_parallel.ranks import ModelRanks
    from penstock.pipe.tensor_parallel.stage import divide_stage

    for stage in stages:
        divide_stage(stage, ModelRanks(group, stage=stage.index, meter=meter, watcher=watcher), mesh)


def _shard(
    config: TrainConfig, stages: Sequence[Stage], mesh: "DeviceMesh", meter: Meter, watcher: Watcher
) -> dict[str, "CompressedReduceScatter"]:
    """Divide the stages; gives what compresses their layers' gradients, by name."""
    from penstock.compression.sharded import CompressedAllGather, CompressedReduceScatter
    from penstock.runtime.sharding.stage import shard_stage

    section, algorithm = config.compression, _algorithm(config)
    compress = None
    if algorithm is not None:
        compress = partial(
            CompressedReduceScatter,
            algorithm,
            error_feedback=section.feedback(),
            warmup_steps=section.warmup_steps,
            undoable=config.precision == "fp16",
            meter=meter,
            watcher=watcher,
        )
    gather = None
    if section.weights != "none":
        of_weights = create_compression_algorithm(section.weights, section.weights_options)
        gather = partial(CompressedAllGather, of_weights, meter=meter, watcher=watcher)
    compressed: dict[str, CompressedReduceScatter] = {}
    for stage in stages:
        compressed |= shard_stage(
            stage,
            mesh=mesh,
            reshard_after_forward=config.data_parallel.reshard_after_forward,
            compress=compress,
            gather=gather,
            meter=meter,
            watcher=watcher,
        )
    return compressed


def _whole_exchange(
    config: TrainConfig, stages: Sequence[Stage], groups: PipeGroups, meter: Meter, watcher: Watcher
) -> GradientExchange:
    """The exchange of tied weights, which sharding leaves whole on every replica."""
    tied = {id(pair[1]): pair for stage in stages for _, pairs in sorted(stage.tied.items()) for pair in pairs}
    if not tied:
        return LocalGradients([], replicas=groups.num_replicas)
    return _reducer(config, [[pair] for pair in tied.values()], groups.replicas, meter, watcher)


def _all(shared: SharedParameters) -> list[nn.Parameter]:
    return [parameter for _, parameter in (*shared.own, *shared.shared)]
