"""Divides a stage over the ranks of a ``model`` axis."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from penstock.pipe.stage import Stage
from penstock.pipe.tensor_parallel.plan import plan_of
from penstock.pipe.tensor_parallel.ranks import ModelRanks
from penstock.pipe.tensor_parallel.styles import STYLE_OF


def divide_stage(stage: Stage, ranks: ModelRanks, mesh: DeviceMesh) -> None:
    """Divide a stage's layers by their plans, in place; names and canonical order stay.

    Args:
        stage: Its weights are the same on every rank of the axis; afterwards each keeps its part of those that a plan
            names, as a DTensor.
        ranks: The axis. Collective over it.
        mesh: The same ranks.

    Raises:
        ValueError: A layer cannot be divided over so many ranks.
    """
    done: set[int] = set()
    for index, module in stage.canonical_modules():
        if id(module) in done:  # tied layers of one stage are one module
            continue
        done.add(id(module))
        plan = plan_of(index, module, ranks.size)
        if plan:
            parallelize_module(module, mesh, {path: STYLE_OF[style](ranks) for path, style in plan.items()})
