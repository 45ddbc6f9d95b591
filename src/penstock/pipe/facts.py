"""What must fit together before the first step: on one rank, and between ranks."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch

from penstock._version import __version__
from penstock.pipe.codec import Codec
from penstock.pipe.groups import PipeGroups
from penstock.pipe.schedule import Schedule
from penstock.pipe.stage import Stage


def engine_facts(
    stages: Sequence[Stage], schedule: Schedule, micro_batches: int, seed: int, *, codecs: Mapping[str, Codec]
) -> dict[str, Any]:
    """Facts for :func:`penstock.pipe.agreement.agree`.

    Neighbours state the layer where one ends and the next begins under the same label; so do replicas of a stage.
    """
    facts: dict[str, Any] = {
        "penstock version": __version__,
        "torch version": torch.__version__,
        "schedule": schedule.name,
        "number of stages": schedule.num_stages,
        "micro-batches per step": micro_batches,
        "order of the schedule": _digest(schedule.to_text()),
        "seed": seed,
        "default dtype": str(torch.get_default_dtype()),
        "encoding of values between ranks": {direction: codec.name for direction, codec in sorted(codecs.items())},
    }
    for stage in stages:
        facts[f"first layer of stage {stage.index}"] = stage.start
        end = "number of layers" if stage.is_last else f"first layer of stage {stage.index + 1}"
        facts[end] = stage.stop
        facts[f"parameters of stage {stage.index}"] = _parameters(stage)
        for key, named in sorted(stage.tied.items()):
            facts[f"tied weight {key!r}"] = [
                [name, list(parameter.shape), str(parameter.dtype)]
                for name, parameter in sorted(named, key=lambda p: p[0])
            ]
    return facts


def check_fit(stages: Sequence[Stage], schedule: Schedule, micro_batches: int, groups: PipeGroups) -> None:
    """Refuse stages, a schedule and a topology that do not fit together, with a ValueError that says why."""
    if schedule.micro_batches != micro_batches:
        raise ValueError(
            f"schedule {schedule.name!r} is for {schedule.micro_batches} micro-batches, "
            f"but the engine was given micro_batches={micro_batches}"
        )
    if schedule.num_ranks != groups.num_pipe_ranks:
        raise ValueError(
            f"schedule {schedule.name!r} is for {schedule.num_ranks} pipeline ranks, "
            f"but the topology's pipe axis has {groups.num_pipe_ranks}"
        )
    held = tuple(stage.index for stage in stages)
    placed = schedule.stages_of(groups.pipe_rank)
    if held != placed or any(stage.num_stages != schedule.num_stages for stage in stages):
        raise ValueError(
            f"schedule {schedule.name!r} of {schedule.num_stages} stages places stages {list(placed)} on pipeline rank "
            f"{groups.pipe_rank}, but it was given stages {list(held)} of {stages[0].num_stages}"
        )
    if schedule.forward_only:
        raise ValueError(f"schedule {schedule.name!r} only runs forward; training needs one such as '1f1b'")


def _parameters(stage: Stage) -> dict[str, Any]:
    described = [
        [name, list(parameter.shape), str(parameter.dtype), parameter.requires_grad]
        for name, parameter in stage.canonical_parameters()
    ]
    return {
        "tensors": len(described),
        "elements": sum(parameter.numel() for _, parameter in stage.canonical_parameters()),
        "dtypes": sorted({str(parameter.dtype) for _, parameter in stage.canonical_parameters()}),
        "digest": _digest(json.dumps(described)),
    }


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
