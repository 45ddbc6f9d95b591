"""What a model's layers cost, as measured."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from penstock._core.files import read_json, write_json

FORMAT: Final = "penstock.profile"
VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """One layer, for one micro-batch. Times are in seconds, sizes in bytes.

    Attributes:
        name: Of its class or function.
        forward: F; the loss counts with the last layer.
        backward: B, the whole backward pass.
        input_gradient: I, its first half where it is split.
        weight_gradient: W, its second half.
        kept: What its backward pass needs: saved tensors but for parameters and buffers, each storage once.
        shared: The part of ``kept`` that the layer before keeps too, so that it counts once where both are on a stage.
        input_beyond: Of its input, what it does not keep itself; a stage holds its input all the same.
        output_beyond: Of its output, likewise.
        output: Of its output, which travels where a stage ends here.
        loss_kept: Of ``kept``, on the last layer, what the loss function keeps: recomputing the layer does not free it.
        parameters: Of its parameters and buffers.
        trained: How many trainable parameters it has, which tells models apart.
        state: Of gradients and the optimizer's state.
        update: Its share of clipping, optimizer step and clearing.
        tie: The tie key, if its parameters are shared with other layers.
        whole: Why (some of) its weight gradients cannot wait; empty where it is splittable.
    """

    name: str
    forward: float
    backward: float
    input_gradient: float
    weight_gradient: float
    kept: int = 0
    shared: int = 0
    input_beyond: int = 0
    output_beyond: int = 0
    output: int = 0
    parameters: int = 0
    state: int = 0
    update: float = 0.0
    tie: str | None = None
    whole: tuple[str, ...] = ()
    loss_kept: int = 0
    trained: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.type in (float, int) and not (number and 0 <= value < math.inf):
                raise ValueError(f"{self.name}: {field.name} must be finite and not negative, got {value!r}")


@dataclass(frozen=True)
class Profile:
    """A model at one size of micro-batch.

    Attributes:
        micro_batch_size: Rows.
        layers: In model order.
        latency: Seconds that a message takes whatever its size.
        seconds_per_byte: What it takes for each byte besides.
        action: Seconds that every action takes besides the layers: taking values from messages and putting them in.
        step: Seconds that every step takes besides actions and updates.
        concurrent: Processes that computed at the same time while it was measured.
        reading: Seconds that reading a micro-batch takes; a step begins with all of its own.
    """

    micro_batch_size: int
    layers: tuple[LayerCosts, ...]
    latency: float = 0.0
    seconds_per_byte: float = 0.0
    action: float = 0.0
    step: float = 0.0
    concurrent: int = 1
    reading: float = 0.0

    def transfer(self, layer: int) -> float:
        """Seconds from the end of the action that makes a layer's output to its arrival on another rank."""
        return self.latency + self.seconds_per_byte * self.layers[layer].output


def save_profiles(profiles: Sequence[Profile], path: str | os.PathLike[str]) -> None:
    """Write profiles of one model to a JSON file."""
    write_json(path, {"format": FORMAT, "version": VERSION, "profiles": [asdict(profile) for profile in profiles]})


def load_profiles(path: str | os.PathLike[str]) -> list[Profile]:
    """Read :func:`save_profiles`'s file.

    Raises:
        ValueError: It is something else.
    """
    return profiles_from_json(read_json(path), path)


def profiles_from_json(value: Any, where: object = "profile") -> list[Profile]:
    """Read the JSON value of :func:`save_profiles`; errors as for :func:`load_profiles`."""
    if not isinstance(value, dict) or (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{where}: is no {FORMAT} file of version {VERSION}; penstock plan --save-profile makes one")
    try:
        profiles = [
            Profile(**{**entry, "layers": tuple(layer_from_json(layer) for layer in entry["layers"])})
            for entry in value["profiles"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not profiles or len({len(profile.layers) for profile in profiles}) != 1 or not profiles[0].layers:
        raise ValueError(f"{where}: needs at least one profile, all of one number of layers")
    return profiles


def layer_from_json(value: dict[str, Any]) -> LayerCosts:
    """One layer of a profile."""
    return LayerCosts(**{**value, "whole": tuple(value["whole"])})
