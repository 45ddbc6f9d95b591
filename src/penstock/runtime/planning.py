"""``penstock plan``: from a run's configuration to profiles, and from a plan to a configuration."""

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from penstock._core.files import write_bytes
from penstock._core.waiting import Watcher
from penstock.pipe import schedule as schedules
from penstock.pipe.planner import TRAINABLE, WHOLE, Plan, Prediction, Profile, load_profiles, plan, save_profiles
from penstock.pipe.schedule import SCHEDULES, Timeline, save_schedule, save_timeline
from penstock.pipe.topology import PipeDataParallelTopology
from penstock.runtime.config import TrainConfig, check_world, load_config
from penstock.runtime.engine_costs import step_overhead
from penstock.runtime.initialize import AUTOCAST_DTYPES, PARAMETER_DTYPES
from penstock.runtime.launch import launch
from penstock.runtime.main_job import reference_model
from penstock.runtime.preparation import open_training_data, training_order
from penstock.runtime.process import Process
from penstock.runtime.profiling import Profiler, profiling_groups, timed_batch

_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_FACTORS: Final = (0.5, 1, 2, 4)


def read_config(path: Path, overrides: Sequence[str]) -> TrainConfig:
    """The configuration of a run that can be planned.

    Raises:
        ValueError: It cannot; the message says what to change.
    """
    config = load_config(path, overrides)
    if config.model is None:
        raise ValueError("the configuration needs a model section; a model of your own is planned from Python")
    if config.data.train is None:
        raise ValueError("layers are measured on training data: set data.train, a .bin/.idx prefix")
    if config.tensor_parallel.size > 1:
        raise ValueError(
            f"tensor_parallel.size={config.tensor_parallel.size}: layers are measured whole, which no rank of that run "
            "computes; plan with --set tensor_parallel.size=1 for the order of the candidates"
        )
    if config.batching.token_budget is not None or config.batching.sizes or config.batching.sequence_length:
        raise ValueError(
            "a plan is made for steps that are all alike, which those of the batching section are not; plan with "
            "train.global_batch_size and train.micro_batch_size alone, and put the plan's pipe section in"
        )
    return config


def replicas_of(config: TrainConfig) -> int:
    """Replicas that are planned for: the configuration's, or one."""
    return config.data_parallel.replicas or 1


def candidate_sizes(config: TrainConfig, given: Iterable[int] | None = None) -> list[int]:
    """Sizes of micro-batches to profile: those given, or the configuration's, half of it, and two and four times it.

    Raises:
        ValueError: A given one does not divide the samples of a pipeline.
    """
    samples = config.train.global_batch_size // replicas_of(config)
    if given is None:
        about = {round(factor * config.train.micro_batch_size) for factor in _FACTORS}
        return sorted(size for size in about if size >= 1 and samples % size == 0)
    sizes = sorted(set(given))
    for size in sizes:
        if size < 1 or samples % size:
            raise ValueError(
                f"micro-batches of {size} do not divide the {samples} samples that each pipeline has in a step"
            )
    return sizes


def measured_profiles(
    path: Path, overrides: Sequence[str], config: TrainConfig, sizes: Sequence[int], *, memory: int | None = None
) -> list[Profile]:
    """Launch as many processes as the run has, and have them measure the layers all at once, within a memory limit."""
    processes = check_processes(config)
    with tempfile.TemporaryDirectory(prefix="penstock-plan-") as folder:
        file = Path(folder) / "profile.json"
        if processes == 1:
            measure(config, sizes, file, memory=memory)
        else:
            arguments = ["plan", str(path), "--save-profile", str(file)]
            arguments += [part for override in overrides for part in ("--set", override)]
            arguments += [part for size in sizes for part in ("--micro-batch-size", str(size))]
            arguments += [] if memory is None else ["--memory", str(memory)]
            code = launch(arguments, processes=processes, shutdown_s=config.deadline_s)
            if code:
                raise ValueError(f"measuring the layers ended with exit code {code}; see the message above")
        return load_profiles(file)


def check_processes(config: TrainConfig) -> int:
    """How many processes the run has."""
    return config.pipe.stages * replicas_of(config)


def measure(config: TrainConfig, sizes: Sequence[int], file: Path, *, memory: int | None = None) -> None:
    """Measure as one of the processes of a run; the first one writes the profiles. Collective."""
    module = reference_model(config).divided_by("parameters", config.pipe.stages)
    dataset = open_training_data(config)
    order = training_order(config, dataset)
    world_size = Process.planned_world_size()
    replicas = check_world(config, world_size)
    topology = PipeDataParallelTopology(num_pp=config.pipe.stages, num_dp=replicas)
    process = Process.join(config.deadline_s)
    overhead = step_overhead(config)
    with Watcher(rank=process.rank, deadline_s=config.deadline_s, store=process.store) as watcher:
        with profiling_groups(topology, process, watcher, config.deadline_s) as groups:
            profiler = Profiler(
                module=module,
                config=config,
                loss_fn=module.loss_fn,
                groups=groups,
                device=process.device,
                dtype=PARAMETER_DTYPES[config.precision],
                autocast_dtype=AUTOCAST_DTYPES.get(config.precision),
                watcher=watcher,
                overhead=overhead,
                memory=memory,
            )
            profiles = []
            for size in sizes:
                batch, reading = timed_batch(dataset, order, size, process.device)
                profiles.append(profiler.profile(size, batch, reading=reading, split=_splits(config)))
        if process.rank == 0:
            save_profiles(profiles, file)
    process.leave()


def _splits(config: TrainConfig) -> bool:
    """Whether a run of this configuration splits backward passes."""
    return not (config.data_parallel.sharded or config.compile.enabled)


def profiles_in(file: Path, config: TrainConfig, sizes: Iterable[int] | None = None) -> list[Profile]:
    """Measurements that were kept, of the configuration's model.

    Args:
        file: From ``penstock plan --save-profile``.
        config: Of the run that is planned.
        sizes: Of the micro-batches to choose from; None takes all that are there.

    Raises:
        ValueError: They are of another model, or a size is not among them.
    """
    profiles = load_profiles(file)
    model = reference_model(config)
    wanted = [(model.type_name(index), count) for index, count in enumerate(model.parameter_counts)]
    there = [(layer.name, layer.trained) for layer in profiles[0].layers]
    if there != wanted:
        raise ValueError(
            f"{file}: is of another model, {_described(there)}, where the configuration's has {_described(wanted)}; "
            "measure again (leave --profile out)"
        )
    by_size = {profile.micro_batch_size: profile for profile in profiles}
    missing = sorted(set(sizes or ()) - by_size.keys())
    if missing:
        raise ValueError(
            f"{file}: has no measurements of micro-batches of {', '.join(map(str, missing))}, but of "
            f"{', '.join(map(str, sorted(by_size)))}; take one of these, or measure again (leave --profile out)"
        )
    return [by_size[size] for size in sorted(set(sizes or by_size))]


def _described(layers: Sequence[tuple[str, int]]) -> str:
    """Layers in a few words: how many there are, of which classes, and how much they train."""
    names = ", ".join(dict.fromkeys(name for name, _ in layers))
    return f"{len(layers)} layers ({names}) with {sum(count for _, count in layers):,} trainable parameters"


def plan_run(
    config: TrainConfig, profiles: Sequence[Profile], *, memory: int | None = None, search_effort_s: float = 0.0
) -> Plan:
    """Choose for a configuration; see :func:`penstock.pipe.planner.plan`."""
    return plan(
        profiles,
        ranks=config.pipe.stages,
        samples=config.train.global_batch_size // replicas_of(config),
        memory=memory,
        schedules=TRAINABLE if _splits(config) else WHOLE,
        search_effort_s=search_effort_s,
    )


def write_config(config: TrainConfig, choice: Prediction, path: Path) -> None:
    """Write the configuration with a choice put in; a schedule that has no name is written beside it."""
    schedule = choice.schedule
    name = schedule.name
    if name not in SCHEDULES:
        file = path.with_suffix(".schedule.json")
        save_schedule(schedule, file)
        name = str(file.resolve())
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    values["pipe"] |= {
        "schedule": name,
        "chunks": choice.chunks,
        "partition_method": list(choice.bounds),
        "activation_checkpoint_interval": choice.interval,
        "activation_checkpoint_layers": list(choice.recomputed),
    }
    values["train"]["micro_batch_size"] = choice.micro_batch_size
    load_config(values)
    write_bytes(path, yaml.safe_dump(values, sort_keys=False).encode())


def bytes_of(text: str) -> int:
    """Bytes from text such as ``8GiB``, ``500 MB`` or ``1000000``.

    Raises:
        ValueError: It is something else.
    """
    match = _SIZE.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no size; write it like 8GiB, 500MB or 1000000")
    return round(float(match[1]) * float(1024 if match[3] else 1000) ** _POWERS[match[2].lower()])


def notes(config: TrainConfig) -> list[str]:
    """What a plan leaves out, for this configuration."""
    said = []
    if replicas_of(config) > 1:
        said.append(f"not in the step: the exchange of gradients over {replicas_of(config)} replicas")
    if config.data_parallel.sharded:
        said.append("not in the peaks: that parameters, gradients and optimizer state are divided over the replicas")
    if config.pipe.activation_compression != "none":
        said.append("messages count in full, though pipe.activation_compression makes them smaller")
    if config.random_ltd_enabled:
        said.append("planned for whole sequences, to which token dropping grows")
    return said


def write_timeline(
    timeline: Timeline, file: Path | None, *, svg: Path | None, png: Path | None, html: Path | None, trace: Path | None
) -> None:
    """Write a timeline in the forms asked for."""
    if file is not None:
        save_timeline(timeline, file)
    if svg is not None:
        write_bytes(svg, schedules.svg(timeline).encode())
    if png is not None:
        write_bytes(png, schedules.png(timeline))
    if html is not None:
        write_bytes(html, schedules.html(timeline).encode())
    if trace is not None:
        schedules.save_trace(timeline, trace)
