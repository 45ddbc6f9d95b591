"""A model as a list of layers, divided over pipeline stages."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from penstock._core.keys import derive, seed_torch
from penstock.pipe.layer_facts import LayerFacts
from penstock.pipe.layer_spec import LayerSpec, TiedLayerSpec, callable_name, layer_name
from penstock.pipe.partition import MEASURED, check_method, check_num_stages, partition
from penstock.pipe.recomputed_layers import check_recomputed, recomputed_layers
from penstock.pipe.stage import FunctionLayer, Stage
from penstock.pipe.ties import find_ties
from penstock.pipe.topology import ProcessTopology

__all__ = ["Layer", "LayerSpec", "PipelineModule", "TiedLayerSpec"]

Layer: TypeAlias = LayerSpec | nn.Module | Callable[[Any], Any]
"""What a list of layers may contain: a spec, a module, or a plain function of one value."""


class PipelineModule:
    """A model as a list of layers: metadata only, checked on construction.

    Each layer is called with one argument, what the layer before returned: any nest of tuples, lists, dicts, tensors
    and plain values. Nothing is allocated here: specs are built on torch's meta device to count their parameters (a
    layer that cannot be built there is built on the CPU, one at a time, and dropped). :meth:`build_stage` makes the
    real layers of one stage.

    Weights are drawn from a generator seeded with ``(base_seed, canonical layer index)``, on the CPU, so they depend
    neither on the partition nor on the device; layers of one tie key use the index of the first. ``nn.Module``
    instances, in the list or among a spec's arguments, keep the weights they have; each stage gets a copy of its own
    ones, and the instance is left alone. Where all layers are such instances and in eval mode, as a model is after
    loading, the copies are put into train mode; single layers in eval mode stay in it.

    Args:
        layers: :class:`LayerSpec`, :class:`TiedLayerSpec`, ``nn.Module`` instances and plain callables, in order.
        num_stages: Pipeline stages. May be left to ``topology``, or to whoever knows later (:meth:`partitioned`).
        topology: Its ``pipe`` axis gives the number of stages.
        loss_fn: ``loss_fn(output, targets)`` returns a scalar tensor. None: the last layer returns the loss.
        seed_layers: Seed as DeepSpeed does, with ``base_seed + index`` in place of the derived key.
        seed_fn: With ``seed_layers``, called with ``base_seed + index`` before each layer is built, in place of
            seeding torch, numpy and ``random``.
        base_seed: Where the weights come from.
        partition_method: ``"parameters"`` (balance trainable parameters), ``"uniform"`` (balance layers),
            ``"type:regex"`` (balance layers whose class name matches), ``"profile"`` (make the predicted step shortest:
            ``penstock.initialize`` measures the layers first), or explicit bounds such as ``[0, 4, 9]``.
        activation_checkpoint_interval: Recompute the activations of groups of this many layers in the backward pass;
            0 keeps all.
        activation_checkpoint_layers: Recompute those of the layers of these classes (by name) or of these numbers,
            each by itself, and keep the others'; in place of an interval.

    Attributes:
        specs: The layers as given.
        num_layers: How many.
        bounds: Stage ``s`` holds layers ``bounds[s]`` to ``bounds[s + 1] - 1``; None until ``num_stages`` is known and,
            with ``"profile"``, layers are measured.
        parameter_counts: Trainable parameters of each layer; a tied layer counts wherever it lies.
        total_parameters: Trainable parameters of the model; tied ones count once.
        tied: For each tie key, the canonical indices of its layers.

    Raises:
        ValueError: Anything that can be seen to be wrong now; the message says what and what to change.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str | Sequence[int] = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_layers: Sequence[str | int] = (),
    ) -> None:
        self.specs = _checked_layers(layers)
        if loss_fn is not None and not callable(loss_fn):
            raise ValueError(f"loss_fn must be a callable (output, targets), got {type(loss_fn).__name__}")
        if seed_fn is not None and not seed_layers:
            raise ValueError("seed_fn is called only with seed_layers=True; set it, or drop seed_fn")
        self.loss_fn = loss_fn
        self.seed_layers = seed_layers
        self.seed_fn = seed_fn
        self.base_seed = base_seed
        self.partition_method = partition_method if isinstance(partition_method, str) else tuple(partition_method)
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.topology = topology
        self.num_stages = _number_of_stages(num_stages, topology, self.partition_method)
        names = [_type_name(layer) for layer in self.specs]
        check_method(self.partition_method, names)
        self.activation_checkpoint_layers = check_recomputed(
            activation_checkpoint_interval, activation_checkpoint_layers, names
        )
        if self.num_stages is not None:
            check_num_stages(self.num_stages, self.num_layers)
        facts = [self._facts(index) for index in range(self.num_layers)]
        self.parameter_counts = tuple(layer.trainable for layer in facts)
        self._ties = find_ties(self.specs, facts)
        copies = sum(self.parameter_counts[i] for tie in self._ties.values() for i in tie.layers[1:])
        self.total_parameters = sum(self.parameter_counts) - copies
        self.bounds = self._bounds(self.num_stages)

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self.specs)

    @property
    def measured(self) -> bool:
        """Whether the bounds have to wait until layers are measured."""
        return self.partition_method == MEASURED

    @property
    def tied(self) -> dict[str, tuple[int, ...]]:
        """For each tie key, the canonical indices of its layers."""
        return {key: tie.layers for key, tie in self._ties.items()}

    @property
    def takes_labels(self) -> bool:
        """Whether the first layer is to have the labels among its inputs: its class says ``takes_labels = True``."""
        first = self.specs[0]
        return bool(getattr(first.typename if isinstance(first, LayerSpec) else first, "takes_labels", False))

    @property
    def recomputed(self) -> frozenset[int]:
        """Canonical indices of the layers that ``activation_checkpoint_layers`` means."""
        return recomputed_layers(self.activation_checkpoint_layers, [_type_name(layer) for layer in self.specs])

    @staticmethod
    def layer_name(index: int) -> str:
        """The canonical name of a layer, ``layer_000`` for the first."""
        return layer_name(index)

    def partitioned(
        self,
        ranks: int,
        num_stages: int | None = None,
        *,
        partition_method: str | Sequence[int] | None = None,
    ) -> "PipelineModule":
        """The same model divided into another number of stages.

        Args:
            ranks: Pipeline ranks: the size of the topology's ``pipe`` axis, if there is one.
            num_stages: Where ranks hold several stages; None is one for each rank.
            partition_method: In place of the model's own; None keeps that.

        Raises:
            ValueError: More stages than layers, or explicit bounds or a topology for another number.
        """
        other = copy.copy(self)
        if partition_method is not None:
            given = partition_method if isinstance(partition_method, str) else tuple(partition_method)
            check_method(given, [_type_name(layer) for layer in self.specs])
            other.partition_method = given
        _number_of_stages(ranks, self.topology, other.partition_method)
        other.num_stages = ranks if num_stages is None else num_stages
        other.bounds = other._bounds(other.num_stages)
        return other

    def divided_by(self, method: str | Sequence[int], num_stages: int) -> "PipelineModule":
        """The same model divided by another method into any number of stages; errors as for the constructor."""
        other = copy.copy(self)
        other.partition_method = method if isinstance(method, str) else tuple(method)
        other.num_stages = num_stages
        other.bounds = other._bounds(num_stages)
        return other

    def recomputing(self, interval: int, layers: Sequence[str | int] = ()) -> "PipelineModule":
        """The same model with other activations recomputed; errors as for the constructor."""
        other = copy.copy(self)
        names = [_type_name(layer) for layer in self.specs]
        other.activation_checkpoint_layers = check_recomputed(interval, layers, names)
        other.activation_checkpoint_interval = interval
        return other

    def type_name(self, layer: int) -> str:
        """The name of a layer's class or function, by canonical index."""
        return _type_name(self.specs[layer])

    def stage_of(self, layer: int) -> int:
        """The stage that holds a layer, by canonical index.

        Raises:
            ValueError: No such layer, or the number of stages is not known yet.
        """
        bounds = self._known_bounds()
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} does not exist; the model has layers 0 to {self.num_layers - 1}")
        return int(np.searchsorted(bounds, layer, side="right")) - 1

    def build_stage(self, stage: int, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Stage:
        """Build the layers of one stage.

        Layers are built on the CPU one by one and then moved, and the global random states are left as they were.

        Args:
            stage: Its number, from 0.
            device: Where to put parameters and buffers.
            dtype: Floating-point parameters and buffers are cast to it after they are drawn; None leaves them.

        Raises:
            ValueError: No such stage, the number of stages is not known yet, or a layer cannot be built.
        """
        bounds = self._known_bounds()
        if not 0 <= stage < len(bounds) - 1:
            raise ValueError(f"stage {stage} does not exist; the model has stages 0 to {len(bounds) - 2}")
        start, stop = bounds[stage], bounds[stage + 1]
        shared: dict[str, nn.Module] = {}
        forward_fns: dict[int, Callable[[nn.Module, Any], Any]] = {}
        modules = []
        for index in range(start, stop):
            spec = self.specs[index]
            if not isinstance(spec, TiedLayerSpec):
                modules.append(self._built(index, device, dtype))
                continue
            if spec.key not in shared:
                shared[spec.key] = self._built(index, device, dtype)
            modules.append(shared[spec.key])
            if spec.forward_fn is not None:
                forward_fns[index] = spec.forward_fn
        return Stage(
            index=stage,
            num_stages=len(bounds) - 1,
            start=start,
            modules=modules,
            ties=tuple(self._ties.values()),
            forward_fns=forward_fns,
            activation_checkpoint_interval=self.activation_checkpoint_interval,
            recomputed=[i for i in self.recomputed if start <= i < stop],
            device=torch.device(device),
        )

    def _bounds(self, num_stages: int | None) -> tuple[int, ...] | None:
        if num_stages is None or self.measured:
            return None
        names = [_type_name(layer) for layer in self.specs]
        return partition(self.partition_method, num_stages, names=names, parameter_counts=self.parameter_counts)

    def _known_bounds(self) -> tuple[int, ...]:
        if self.bounds is None and self.measured:
            raise ValueError(
                "partition_method 'profile' gives bounds when penstock.initialize has measured the layers; "
                "call it, or divided_by(another method, num_stages)"
            )
        if self.bounds is None:
            raise ValueError(
                "the number of stages is not known yet: give PipelineModule num_stages or a topology, "
                "or call partitioned(num_stages)"
            )
        return self.bounds

    def _built(self, index: int, device: torch.device | str, dtype: torch.dtype | None) -> nn.Module:
        layer = self.specs[index]
        if isinstance(layer, LayerSpec):
            with self._seeded(index):
                module = _build(index, layer)
            if _modules_given(layer):
                module = copy.deepcopy(module)
        elif isinstance(layer, nn.Module):
            module = copy.deepcopy(layer)
        else:
            module = FunctionLayer(layer)
        if self._given_in_eval_mode():
            module.train()
        return module.to(device=device, dtype=dtype)

    def _given_in_eval_mode(self) -> bool:
        """Whether the layers are modules that exist already, all of them in eval mode: a model as it was loaded."""
        given = [_modules_given(layer) for layer in self.specs if isinstance(layer, LayerSpec | nn.Module)]
        return bool(given) and all(modules and not any(m.training for m in modules) for modules in given)

    @contextmanager
    def _seeded(self, index: int) -> Iterator[None]:
        """Seed for the weights of a layer, and afterwards put every global generator back as it was."""
        layer = self.specs[index]
        owner = self._ties[layer.key].owner if isinstance(layer, TiedLayerSpec) else index
        with _random_states_kept():
            if self.seed_layers and self.seed_fn is not None:
                self.seed_fn(self.base_seed + owner)
            elif self.seed_layers:
                _seed_all(self.base_seed + owner)
            else:
                _seed_all(derive(self.base_seed, "init", owner))
            yield

    def _facts(self, index: int) -> LayerFacts:
        layer = self.specs[index]
        if isinstance(layer, nn.Module):
            return LayerFacts.of(layer)
        if not isinstance(layer, LayerSpec):
            return LayerFacts.of(FunctionLayer(layer))
        with _random_states_kept():
            try:
                with torch.device("meta"):
                    return LayerFacts.of(layer.build())
            except Exception:
                # Some constructors read values (``tensor.tolist()``), which meta tensors do not have; and a wrong
                # argument is reported the same from here.
                return LayerFacts.of(_build(index, layer))


def _checked_layers(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    try:
        listed = tuple(layers)
    except TypeError as error:
        raise ValueError(
            f"PipelineModule takes a list of layers, got {type(layers).__name__}; list its layers in the order in "
            "which they are called"
        ) from error
    if not listed:
        raise ValueError("PipelineModule needs at least one layer, got an empty list")
    owner: dict[int, int] = {}
    for index, layer in enumerate(listed):
        if isinstance(layer, type):
            raise ValueError(
                f"{layer_name(index)} is the class {layer.__name__}; write LayerSpec({layer.__name__}, ...) "
                "or give an instance"
            )
        if not isinstance(layer, LayerSpec) and not callable(layer):
            raise ValueError(
                f"{layer_name(index)} is {layer!r} ({type(layer).__name__}); a layer is a LayerSpec, a TiedLayerSpec, "
                "a torch.nn.Module or a callable of one value"
            )
        for module in _modules_given(layer):
            for name, parameter in module.named_parameters():
                first = owner.setdefault(id(parameter), index)
                if first != index and not _tied(layer, listed[first]):
                    raise ValueError(
                        f"{layer_name(index)} and {layer_name(first)} share the parameter {name!r}; "
                        "layers may lie on different stages, so say it with a TiedLayerSpec for each"
                    )
    return listed


def _number_of_stages(
    num_stages: int | None, topology: ProcessTopology | None, method: str | tuple[int, ...]
) -> int | None:
    if num_stages is not None and not _is_integer(num_stages):
        raise ValueError(f"num_stages must be an integer, got {num_stages!r}")
    if topology is not None:
        if "pipe" not in topology.get_axis_names():
            raise ValueError(f"the topology has no 'pipe' axis, only {topology.get_axis_names()}")
        pipe = topology.get_dim("pipe")
        if num_stages is not None and num_stages != pipe:
            raise ValueError(
                f"num_stages is {num_stages}, but the topology's pipe axis has size {pipe}; make them equal"
            )
        num_stages = pipe
    if isinstance(method, str) or num_stages is not None:
        return num_stages
    return len(method) - 1


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type_name(layer: Layer) -> str:
    return layer.name if isinstance(layer, LayerSpec) else callable_name(layer)


def _tied(layer: Layer, other: Layer) -> bool:
    return isinstance(layer, TiedLayerSpec) and isinstance(other, TiedLayerSpec) and layer.key == other.key


def _modules_given(layer: Layer) -> list[nn.Module]:
    """Modules that exist already: the layer itself, or arguments of its spec."""
    if isinstance(layer, nn.Module):
        return [layer]
    if not isinstance(layer, LayerSpec):
        return []
    return [v for v in (*layer.module_args, *layer.module_kwargs.values()) if isinstance(v, nn.Module)]


def _build(index: int, spec: LayerSpec) -> nn.Module:
    try:
        return spec.build()
    except Exception as error:
        raise ValueError(f"{layer_name(index)}: cannot build {spec!r}: {type(error).__name__}: {error}") from error


@contextmanager
def _random_states_kept() -> Iterator[None]:
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _seed_all(seed: int) -> None:
    """Seed every generator that a layer's constructor may draw from on the CPU."""
    seed_torch(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
