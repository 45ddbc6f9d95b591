"""Micro-batches cut along the sequence, for schedules whose unit is a slice."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from torch import Tensor, nn

from penstock.pipe.labels import count_labels
from penstock.pipe.layer_spec import callable_name, layer_name
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.schedule import Schedule
from penstock.pipe.stage import FunctionLayer, Stage, TiedForward
from penstock.pipe.value import flatten, map_tensors

_TOKEN_BY_TOKEN: Final = (nn.Embedding, nn.Linear, nn.Dropout, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh)


def check_slices(stages: Sequence[Stage], schedule: Schedule, loss_fn: object) -> None:
    """Refuse what cannot run slice by slice, with a ValueError that says why."""
    cuts = f"schedule {schedule.name!r} cuts sequences into {schedule.slices} slices"
    if any(action.op == "I" for actions in schedule.ranks for action in actions):
        raise ValueError(f"{cuts} and splits backward passes, which do not go together; keep the latter whole")
    if loss_fn is None:
        raise ValueError(
            f"{cuts}, so the loss is a mean over slices by their labels; give a loss_fn(output, targets), or take a "
            "schedule that keeps sequences whole, such as '1f1b'"
        )
    for stage in stages:
        if stage.activation_checkpoint_interval or stage.recomputed:
            raise ValueError(
                f"{cuts}, and activation checkpointing would compute them again without what came before; leave "
                "activation_checkpoint_interval and activation_checkpoint_layers out, or take '1f1b'"
            )
        for index, layer in zip(range(stage.start, stage.stop), stage.layers.values(), strict=True):
            if not _takes_slices(layer):
                raise ValueError(
                    f"{cuts}, but {layer_name(index)} ({callable_name(layer)}) may mix tokens in a way that needs "
                    "them all; mark its class with penstock.pipe.takes_slices if it treats each token alone or looks "
                    "back by current_slice(), or take a schedule that keeps sequences whole, such as '1f1b'"
                )


def _takes_slices(layer: nn.Module) -> bool:
    function = (
        layer.forward_fn
        if isinstance(layer, TiedForward)
        else layer.function
        if isinstance(layer, FunctionLayer)
        else type(layer)  # a wrapper may pass on the attributes of the layer inside
    )
    if getattr(function, "takes_slices", False):
        return True
    if type(layer) is nn.Sequential:
        return all(map(_takes_slices, layer))
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return len(layer.normalized_shape) == 1
    return type(layer) in _TOKEN_BY_TOKEN


def cut_batches(batches: Sequence[MicroBatch], slices: int) -> list[MicroBatch]:
    """The slices of all micro-batches, in the order of a schedule's units.

    Their weights are such that the mean over the slices is the mean over the micro-batches, where a loss is a mean over
    labels.

    Args:
        batches: Tensors of two dimensions or more are ``[rows, tokens, ...]``; others go with every slice.
        slices: How many of each; their lengths differ by at most one token.
    """
    units: list[MicroBatch] = []
    for batch in batches:
        inputs = _cut(batch.inputs, slices, f"micro-batch {batch.index}: its inputs")
        targets = _cut(batch.targets, slices, f"micro-batch {batch.index}: its targets")
        counts = [1 if part is None else count_labels(part) for part in targets]
        total = sum(counts)
        units += [
            replace(batch, inputs=x, targets=y, weight=batch.weight * (slices * n / total if total else 1.0))
            for x, y, n in zip(inputs, targets, counts, strict=True)
        ]
    return units


def _cut(value: Any, slices: int, what: str) -> list[Any]:
    if value is None:  # this rank has no use for them
        return [None] * slices
    lengths = {tensor.shape[1] for tensor in flatten(value, what=what)[1] if tensor.dim() >= 2}
    if len(lengths) != 1:
        raise ValueError(
            f"{what} must hold tensors of [rows, tokens, ...] with one number of tokens to be cut into {slices} "
            f"slices; their second sizes are {sorted(lengths)}"
        )
    (length,) = lengths
    if length < slices:
        raise ValueError(f"{what} have {length} tokens, too few for {slices} slices; take fewer slices")
    bounds = [length * at // slices for at in range(slices + 1)]

    def part(start: int, stop: int) -> Any:
        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, start:stop] if tensor.dim() >= 2 else tensor

        return map_tensors(cut, value)

    return [part(start, stop) for start, stop in pairwise(bounds)]
