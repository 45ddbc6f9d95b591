"""Activation checkpointing: keep a group of layers' input, and compute what its backward pass needs again.

Unlike with ``torch.utils.checkpoint``, which recomputes at every call of autograd, a group is recomputed at most once
however many calls its backward pass is split into (see :mod:`penstock.pipe.split_backward`). What was recomputed goes
when the node of the graph that needs it goes.

The graph made by the forward pass is the one that runs backward. Each tensor that it would save is replaced by a
:class:`_Place`; the first one asked for has the group run again, and the n-th tensor saved then fills the n-th place.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_local = threading.local()


class RecomputationError(RuntimeError):
    """A group of layers did something else when it ran again."""


class _Place:
    """Where a saved tensor would be. It knows the group, so the group's input lives as long as a place."""

    __slots__ = ("__weakref__", "device", "dtype", "group", "shape", "tensor")

    def __init__(self, group: "_Group", tensor: Tensor) -> None:
        self.group = group
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.tensor: Tensor | None = None


class _Filled(BaseException):
    """Every place is filled; not an Exception, so that no layer's ``except Exception`` swallows it."""


def is_recomputing() -> bool:
    """Whether this thread is computing a group again."""
    return getattr(_local, "depth", 0) > 0


def checkpointed(run: Callable[[Any], Any], value: Any) -> Any:
    """``run(value)``, recomputed in the backward pass.

    Args:
        run: A function of the value alone: it must do the same when called again, and leave the value as it was.
        value: Any nest. Tensors in it that require a gradient get theirs as usual.

    Returns:
        What ``run`` returns.
    """
    group = _Group(run, value)
    with saved_tensors_hooks(group.place, _tensor_of):
        return run(value)


class _Group:
    def __init__(self, run: Callable[[Any], Any], value: Any) -> None:
        self._run = run
        self._value = value
        # A place belongs to the node that saved it: what no node needs any more is not kept.
        self._places: list[weakref.ref[_Place]] = []

    def place(self, tensor: Tensor) -> _Place:
        place = _Place(self, tensor)
        self._places.append(weakref.ref(place))
        return place

    def fill(self) -> None:
        """Run the group again, and fill every place that is left."""
        at = 0

        def save(tensor: Tensor) -> Tensor:
            nonlocal at
            place = self._places[at]()
            at += 1
            if place is not None:
                if (tensor.shape, tensor.dtype, tensor.device) != (place.shape, place.dtype, place.device):
                    raise RecomputationError(
                        _differs(
                            f"saved tensor {at - 1} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, the "
                            f"first time {place.dtype} {tuple(place.shape)} on {place.device}"
                        )
                    )
                place.tensor = tensor.detach()
            if at == len(self._places):
                raise _Filled
            return tensor

        _local.depth = getattr(_local, "depth", 0) + 1
        try:
            with torch.enable_grad(), saved_tensors_hooks(save, lambda saved: saved):
                self._run(self._value)
        except _Filled:
            return
        finally:
            _local.depth -= 1
        if at < len(self._places):
            raise RecomputationError(_differs(f"it saved {at} tensors, the first time {len(self._places)}"))


def _tensor_of(place: _Place) -> Tensor:
    if place.tensor is None:
        place.group.fill()
        assert place.tensor is not None
    return place.tensor


def _differs(what: str) -> str:
    return (
        f"layers recomputed in the backward pass did something else than in the forward pass: {what}; a layer may "
        "depend on its input, its parameters and torch's random numbers only, or set activation_checkpoint_interval: 0"
    )
