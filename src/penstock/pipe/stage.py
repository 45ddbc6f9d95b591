"""The layers that one pipeline stage holds."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from penstock._core.batch_key import BatchKey, current_batch_key, entered
from penstock.pipe.layer_spec import callable_name, layer_name
from penstock.pipe.recompute import checkpointed, is_recomputing
from penstock.pipe.ties import Tie
from penstock.pipe.value import flatten, map_tensors

_LEAF_IN_PLACE = "leaf Variable that requires grad"  # what torch says of an input that another stage sent


class FunctionLayer(nn.Module):
    """A plain callable as a layer."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Any) -> Any:
        """Call the function."""
        return self.function(value)


class TiedForward(nn.Module):
    """A tied module used through its ``forward_fn``."""

    def __init__(self, module: nn.Module, forward_fn: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.forward_fn = forward_fn

    def forward(self, value: Any) -> Any:
        """Call ``forward_fn(module, value)``."""
        return self.forward_fn(self.module, value)


class Cut(NamedTuple):
    """Where a stage's graph was cut in two.

    Attributes:
        outputs: Tensors of the part before the cut that require a gradient.
        leaves: The same values as leaves of the part after it.
    """

    outputs: list[Tensor]
    leaves: list[Tensor]


class Stage(nn.Module):
    """Consecutive layers of a model, run in order; made by ``PipelineModule.build_stage``.

    Parameters are named after the model, not after the stage: ``layer_003.attn.qkv.weight`` is the same weight in any
    partition (:meth:`canonical_parameters`). The ordinary ``state_dict`` has module names instead.

    Attributes:
        index: This stage's number, from 0.
        num_stages: Stages in the pipeline.
        start: Canonical index of the first layer here.
        stop: One past the last.
        layers: The layers by ``str(canonical index)``, as they are called (wrapped, where :meth:`wrap_layers` did so).
        activation_checkpoint_interval: Layers of a group that is recomputed in the backward pass; 0 forms no groups.
        recomputed: Without groups, the canonical indices of the layers that are recomputed, each by itself.
        autocast_dtype: What torch's autocast computes matrix products in, with weights and gradients in their own
            type; None casts nothing.
    """

    def __init__(
        self,
        *,
        index: int,
        num_stages: int,
        start: int,
        modules: Sequence[nn.Module],
        ties: Sequence[Tie] = (),
        forward_fns: Mapping[int, Callable[[nn.Module, Any], Any]] | None = None,
        activation_checkpoint_interval: int = 0,
        recomputed: Collection[int] = (),
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.num_stages = num_stages
        self.start = start
        self.stop = start + len(modules)
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.recomputed = frozenset(recomputed)
        self.autocast_dtype: torch.dtype | None = None
        # Kept, as looking for a parameter in every forward pass takes longer than a small layer.
        self._device = device
        self._ties = {layer: tie for tie in ties for layer in tie.layers if self.start <= layer < self.stop}
        # Kept outside nn.Module's registry: the same modules are registered in ``layers``, perhaps inside wrappers.
        self._canonical = dict(enumerate(modules, start))
        fns = forward_fns or {}
        self.layers = nn.ModuleDict(
            {str(i): TiedForward(module, fns[i]) if i in fns else module for i, module in self._canonical.items()}
        )

    @property
    def is_first(self) -> bool:
        """Whether this stage takes the batch's inputs."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage's output goes to the loss function."""
        return self.index == self.num_stages - 1

    @property
    def device(self) -> torch.device:
        """Where the parameters are; without any, the device the stage was built for."""
        if self._device is None:
            first = next(self.parameters(), None)
            self._device = torch.device("cpu") if first is None else first.device
        return self._device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._device = None  # moved, perhaps
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, value: Any, key: BatchKey | None = None, cuts: list[Cut] | None = None) -> Any:
        """Run the layers in order.

        In train mode every layer draws its random numbers from ``(key, canonical layer index)``, so the result does
        not depend on the partition, and a checkpointed group that is recomputed draws the same ones again.

        Args:
            value: What the layer before returned; for the first stage, the batch's inputs. Any nest of tuples, lists,
                dicts, tensors and plain values.
            key: Names the micro-batch. None leaves torch's random state alone (and then checkpointing saves and
                restores it, which is slower).
            cuts: Given a list, the graph is cut after the first layer (or checkpointed group) whose output requires a
                gradient, unless that is the last one, and the cut is added to the list. A stage whose input requires
                no gradient has an input half to its backward pass only so: the one down to the cut.

        Returns:
            What the last layer here returned.
        """
        recompute = torch.is_grad_enabled() and (self.activation_checkpoint_interval or self.recomputed)
        if not recompute and cuts is None:
            return self._run(self.start, self.stop, value, key)
        for start, stop in self._groups():
            again = recompute and (self.activation_checkpoint_interval or start in self.recomputed)
            run = self._checkpointed if again else self._run
            value = run(start, stop, value, key)
            if cuts is not None and not cuts and stop < self.stop:
                value = _cut(value, cuts)
        return value

    def wrap_layers(self, fn: Callable[[int, nn.Module], nn.Module | None]) -> None:
        """Replace layers by wrappers around them; parameters keep their canonical names.

        Args:
            fn: Called with each layer's canonical index and its module as it is called now; returns the wrapper, or
                None to leave the layer as it is.

        Raises:
            ValueError: A wrapper that lacks a parameter of the layer (it must hold the given module itself, not a copy)
                or brings parameters of its own (they would have no canonical name).
        """
        for name, layer in list(self.layers.items()):
            wrapper = fn(int(name), layer)
            if wrapper is None or wrapper is layer:
                continue
            inside = {id(parameter) for parameter in layer.parameters()}
            outside = {id(parameter) for parameter in wrapper.parameters()}
            if inside != outside:
                raise ValueError(
                    f"{layer_name(int(name))}: the wrapper {type(wrapper).__name__} lacks {len(inside - outside)} of "
                    f"the layer's {len(inside)} parameters and brings {len(outside - inside)} of its own; a wrapper "
                    "must hold the given module itself and add no parameters"
                )
            self.layers[name] = wrapper

    def canonical_modules(self) -> Iterator[tuple[int, nn.Module]]:
        """Each local layer's canonical index and its module as it was built, without wrappers."""
        yield from self._canonical.items()

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each local parameter once, with its canonical name; a tied copy has its owner's name, on every stage."""
        seen: set[int] = set()
        for index, module in self._canonical.items():
            tie = self._ties.get(index)
            prefix = layer_name(index if tie is None else tie.owner)
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{prefix}.{name}", parameter

    @property
    def tied(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """For each tie key with a layer here, the local copies of the shared parameters with their canonical names."""
        found: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for index, tie in self._ties.items():
            if tie.key not in found:
                module = self._canonical[index]
                prefix = layer_name(tie.owner)
                found[tie.key] = [(f"{prefix}.{name}", module.get_parameter(name)) for name in tie.attributes]
        return found

    def share_tied(self, known: dict[tuple[str, str], nn.Parameter]) -> None:
        """Use the tied weights of an earlier stage of this rank in place of copies, and tell later ones of these.

        Args:
            known: By tie key and attribute, what earlier stages hold; this stage's other tied weights are added.
        """
        for index, tie in self._ties.items():
            module = self._canonical[index]
            for attribute in tie.attributes:
                shared = known.setdefault((tie.key, attribute), module.get_parameter(attribute))
                path, _, name = attribute.rpartition(".")
                module.get_submodule(path).register_parameter(name, shared)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which layers and the loss are computed."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _groups(self) -> Iterator[tuple[int, int]]:
        """The layers that run, are recomputed and are cut together, as bounds."""
        size = self.activation_checkpoint_interval or 1
        for start in range(self.start, self.stop, size):
            yield start, min(start + size, self.stop)

    def _run(self, start: int, stop: int, value: Any, key: BatchKey | None) -> Any:
        if self.autocast_dtype is None:
            return self._run_layers(start, stop, value, key)
        with self.autocast():
            return self._run_layers(start, stop, value, key)

    def _run_layers(self, start: int, stop: int, value: Any, key: BatchKey | None) -> Any:
        layers = islice(self.layers.values(), start - self.start, stop - self.start)
        device = self.device if self.training else None
        index = start
        with entered(key or current_batch_key()):
            try:
                for index, layer in enumerate(layers, start):
                    if key is not None and device is not None:
                        key.seed_layer(index, device)
                    value = layer(value)
            except Exception as error:
                error.add_note(f"(penstock: in {layer_name(index)}, {callable_name(self._canonical[index])})")
                if _LEAF_IN_PLACE in str(error):
                    error.add_note(
                        "(penstock: the first layer of a stage must not change its input in place; let it compute a "
                        "new tensor, or put the layer before it on the same stage)"
                    )
                raise
        return value

    def _checkpointed(self, start: int, stop: int, value: Any, key: BatchKey | None) -> Any:
        random_state = torch.get_rng_state() if key is None else None

        def run(kept: Any) -> Any:
            # A layer may fill in the containers that it is given; the recomputation must find them as they were.
            if random_state is None or not is_recomputing():
                return self._run(start, stop, _copy_containers(kept), key)
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(random_state)
                return self._run(start, stop, _copy_containers(kept), key)

        return checkpointed(run, value)

    def extra_repr(self) -> str:
        """Which layers of which pipeline."""
        return f"stage {self.index} of {self.num_stages}, layers {self.start} to {self.stop - 1}"


def _cut(value: Any, cuts: list[Cut]) -> Any:
    try:
        flatten(value)
    except ValueError:
        return value  # an object of an unknown type may hold tensors of the graph, which would not be cut there
    cut = Cut([], [])

    def separate(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        cut.outputs.append(tensor)
        cut.leaves.append(tensor.detach().requires_grad_())
        return cut.leaves[-1]

    value = map_tensors(separate, value)
    if cut.outputs:
        cuts.append(cut)
    return value


def _copy_containers(value: Any) -> Any:
    """The same tensors and plain values in fresh tuples, lists and dicts."""
    if isinstance(value, dict):
        return {key: _copy_containers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy_containers(item) for item in value]
    if isinstance(value, tuple):
        items = [_copy_containers(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
