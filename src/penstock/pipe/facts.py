"""What the ranks of a pipeline must agree on before their first step."""

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch

from penstock._version import __version__
from penstock.pipe.schedule import Schedule
from penstock.pipe.stage import Stage


def engine_facts(stages: Sequence[Stage], schedule: Schedule, micro_batches: int, seed: int) -> dict[str, Any]:
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
