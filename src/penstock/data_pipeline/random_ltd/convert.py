"""Make layers of a model drop tokens, and get the model's own state dict back."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from penstock._core.suggest import unknown_name
from penstock.data_pipeline.random_ltd.config import RandomLTDConfig, read_config
from penstock.data_pipeline.random_ltd.keep_schedule import kept_length
from penstock.data_pipeline.random_ltd.layer import RandomLayerTokenDrop

_LISTED: Final = 12
"""Names that a message lists."""

ConvertType = type[nn.Module] | str | tuple[type[nn.Module] | str, ...]


def convert_to_random_ltd(
    model: nn.Module,
    convert_type: ConvertType,
    config: RandomLTDConfig | Mapping[str, Any] | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
) -> nn.Module:
    """Wrap layers of a model in :class:`RandomLayerTokenDrop`, in place.

    A layer is one by its class (subclasses too) or by its exact qualified name, such as ``"blocks.3"``. Layers are
    counted from 0 in the model's order; one inside another does not count, one used in several places counts once.

    Args:
        model: Any module tree. Wrapped in DDP or DataParallel, its inside is converted.
        convert_type: A layer class, a qualified name, or a tuple of these.
        config: DeepSpeed's ``random_ltd`` section. It chooses which of the layers drop, names their mask and layout,
            and sets the kept length of step 0; attach a :class:`RandomLTDScheduler` to move it. Without a config every
            layer found is wrapped, and keeps all tokens until told otherwise.
        arguments: Kinds or layouts of the layers' arguments by name, before those of the config; see
            :class:`penstock.data_pipeline.random_ltd.layer_rule.LayerRule`.

    Returns:
        The model; the wrapper of it if the model itself is the layer.

    Raises:
        ValueError: No layer was found, a name is unknown, the number of layers is not ``total_layer_num``, or the
            model was converted before.
    """
    section = None if config is None else read_config(config)
    if section is not None and not section.enabled:
        return model
    root = _inside(model)
    if any(isinstance(module, RandomLayerTokenDrop) for module in root.modules()):
        raise ValueError("the model was converted to random-LTD already")
    found = _find(root, convert_type if isinstance(convert_type, tuple) else (convert_type,))
    layers = list(dict.fromkeys(module for _, module in found))
    if section is not None and len(layers) != section.total_layer_num:
        raise ValueError(
            f"the config says total_layer_num={section.total_layer_num}, but the model has {len(layers)} such layers: "
            f"{_some(name for name, _ in found)}. random_ltd_layer_id chooses among all layers that could drop: match "
            "or name all of those"
        )
    wrappers = _wrappers(layers, section, dict(arguments or {}))
    for name, layer in found:
        if layer in wrappers:
            if not name:
                return wrappers[layer]
            parent, _, child = name.rpartition(".")
            setattr(root.get_submodule(parent), child, wrappers[layer])
    return model


def save_without_random_ltd(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as it was before :func:`convert_to_random_ltd`, and as if not wrapped in DDP.

    The wrappers leave no trace in ``model.state_dict()`` either; this name is kept for those who come from DeepSpeed.
    """
    state: dict[str, Tensor] = _inside(model).state_dict()
    return state


def remove_random_ltd(model: nn.Module) -> nn.Module:
    """Put the layers back in the place of their wrappers, in place; the parameters are the same objects.

    Returns:
        The model; the layer itself if the model was its wrapper.
    """
    root = _inside(model)
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if isinstance(module, RandomLayerTokenDrop):
            if not name:
                return module.random_ltd_layer
            parent, _, child = name.rpartition(".")
            setattr(root.get_submodule(parent), child, module.random_ltd_layer)
    return model


def describe_random_ltd(model: nn.Module) -> str:
    """What :func:`convert_to_random_ltd` made of a model: its layers that drop, how many tokens they keep at present
    while training, and how their arguments follow.

    Layers whose arguments follow alike are told together.
    """
    tables: dict[str, list[str]] = {}
    for name, module in _inside(model).named_modules():
        if isinstance(module, RandomLayerTokenDrop):
            place = "" if module.route is None else f" ({module.route} of route {module.layer_id})"
            kept = "all tokens" if module.reserved_length is None else f"{module.reserved_length} tokens of each row"
            heading = f"{name or 'the model'}: {type(module.random_ltd_layer).__name__}{place}, keeps {kept}"
            tables.setdefault(module.describe(), []).append(heading)
    if not tables:
        return "no layer drops tokens"
    return "\n\n".join("\n".join((*layers, table)) for table, layers in tables.items())


def _inside(model: nn.Module) -> nn.Module:
    if isinstance(model, DistributedDataParallel | DataParallel):
        inside = model.module
        assert isinstance(inside, nn.Module)
        return inside
    return model


def _find(root: nn.Module, wanted: tuple[type[nn.Module] | str, ...]) -> list[tuple[str, nn.Module]]:
    """Qualified names and layers, the outermost only, in the model's order, a shared layer at each of its places."""
    classes = tuple(one for one in wanted if not isinstance(one, str))
    names = {one for one in wanted if isinstance(one, str)}
    everything = list(root.named_modules(remove_duplicate=False))
    known = {name for name, _ in everything}
    for name in sorted(names - known):
        of_that_class = [place for place, module in everything if type(module).__name__ == name]
        if of_that_class:
            raise ValueError(
                f"{name!r} is the class of {_some(of_that_class)}; pass the class itself, convert_to_random_ltd(model, "
                f"{name}, ...), or the layers' qualified names"
            )
        raise ValueError(unknown_name("layer", name, known - {""}))
    found: list[tuple[str, nn.Module]] = []
    for name, module in everything:
        inside_another = any(outer == "" or name.startswith(outer + ".") for outer, _ in found)
        if (name in names or isinstance(module, classes)) and not inside_another:
            found.append((name, module))
    if not found:
        looked_for = ", ".join(one if isinstance(one, str) else one.__name__ for one in wanted)
        present = sorted({type(module).__name__ for _, module in everything})
        raise ValueError(f"the model has no layer of {looked_for}; its modules are of {_some(present)}")
    return found


def _some(names: Iterable[str]) -> str:
    """The first of the names, and how many there are beside them."""
    listed = list(names)
    more = f", ... and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def _wrappers(
    layers: list[nn.Module], section: RandomLTDConfig | None, arguments: dict[str, str]
) -> dict[nn.Module, RandomLayerTokenDrop]:
    if section is None:
        return {
            layer: RandomLayerTokenDrop(layer, layer_id, arguments=arguments) for layer_id, layer in enumerate(layers)
        }
    wrappers = {}
    for layer_id in section.random_ltd_layer_id:
        options = section.layer_options(layer_id)
        options["arguments"] = {**options["arguments"], **arguments}
        layer = layers[layer_id]
        wrappers[layer] = RandomLayerTokenDrop(layer, reserved_length=kept_length(section, 0), **options)
        wrappers[layer].section = section
    return wrappers
