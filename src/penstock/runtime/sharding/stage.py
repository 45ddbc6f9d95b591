"""Divides a stage over its replicas."""

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from penstock._core.meter import Meter
from penstock._core.waiting import Watcher
from penstock.compression.sharded import CompressedAllGather, CompressedReduceScatter, install
from penstock.pipe.stage import Stage
from penstock.runtime.sharding.communication import GatherParameters, ScatterGradients


def shard_stage(
    stage: Stage,
    *,
    mesh: DeviceMesh,
    reshard_after_forward: bool,
    compress: Callable[[], CompressedReduceScatter] | None = None,
    gather: Callable[[], CompressedAllGather] | None = None,
    meter: Meter,
    watcher: Watcher,
) -> dict[str, CompressedReduceScatter]:
    """Divide a stage's layers over its replicas, in place: each layer's parameters are gathered where it runs.

    Tied weights stay whole on every replica: their gradients are summed over stages, and functions that use them
    outside their module (an output layer that reads the embedding's weight) could not know when to gather them.

    Args:
        stage: Its parameters become DTensors, divided along their first dimension; names stay. Parameters that a
            ``model`` axis of the same mesh divides already are divided further.
        mesh: The stage's replicas. Collective over them.
        reshard_after_forward: Free a layer's gathered parameters after every forward pass and gather them again for
            its backward pass: less memory, and an all-gather for every pass of every micro-batch. Otherwise they stay
            until the step's last backward pass.
        compress: Makes what reduces a layer's gradients; None reduces them as they are.
        gather: Makes what gathers a layer's parameters; None gathers them as they are.
        meter: Counts the bytes (``replicas``).
        watcher: Told of the waits.

    Returns:
        What ``compress`` made, by the layers' names.
    """
    tied: set[nn.Parameter] = {parameter for pairs in stage.tied.values() for _, parameter in pairs}
    for _, module in stage.canonical_modules():
        if any(parameter not in tied for parameter in module.parameters()):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=tied)
    fully_shard(stage, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=tied)
    compressed: dict[str, CompressedReduceScatter] = {}
    for name, module in stage.named_modules():
        if isinstance(module, FSDPModule):
            # Gradients are scaled by the weight of their micro-batches, not by the number of replicas.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if gather is None:
                module.set_custom_all_gather(GatherParameters(meter, watcher, stage.index))
            else:
                module.set_custom_all_gather(gather())  # type: ignore[arg-type]
            if compress is None:
                module.set_custom_reduce_scatter(ScatterGradients(meter, watcher, stage.index))
            else:
                compressed[f"stage_{stage.index}.{name}"] = scatter = compress()
                install(module, scatter)
    return compressed
