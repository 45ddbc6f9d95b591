"""Names for what a configuration file cannot hold: datasets, transforms, models, losses, optimizers.

A name is one that was registered (:func:`register_components`), or an import path ``package.module:attribute``. Nothing
is evaluated: an import path names a module to import and an attribute to take from it.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock._core.suggest import unknown_name
from penstock.data_pipeline.datasets.collate import IGNORED, TokenCollator

Factory = Callable[..., Any]


def token_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross entropy in nats over the labels that are not ``-100``; a scalar in the logits' dtype."""
    return F.cross_entropy(logits_BSV.flatten(0, -2), labels_BS.flatten(), ignore_index=IGNORED)


_components: Final[dict[str, dict[str, Factory]]] = {
    "dataset": {},
    "transform": {},
    "collate": {"tokens": TokenCollator},
    "model": {},
    "loss": {
        "cross_entropy": F.cross_entropy,
        "token_cross_entropy": token_cross_entropy,
        "mse": F.mse_loss,
    },
    "optimizer": {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD},
}

KINDS: Final = tuple(_components)
"""What a component may be: ``dataset``, ``transform``, ``collate``, ``model``, ``loss``, ``optimizer``."""


def register_components(
    components: Mapping[str, Mapping[str, Factory | str]] | None = None,
    *,
    replace: bool = False,
    **kinds: Mapping[str, Factory | str],
) -> None:
    """Give names to a user's own parts, for use in configurations.

    Example::

        register_components(model={"tiny": make_tiny_model}, loss={"focal": "mylib.losses:focal_loss"})

    Args:
        components: For each kind (see :data:`KINDS`), names and what they stand for: a callable that makes the
            component from the configuration's arguments (for ``transform`` and ``loss`` also the plain function
            itself), or an import path.
        replace: Allow a name to change its meaning. Registering the same thing twice is always fine.
        kinds: The same as ``components``, as keyword arguments.

    Raises:
        ValueError: A kind is unknown, a name is taken or malformed, or a component cannot be called or imported.
    """
    found: list[tuple[str, str, Factory]] = []
    for source in (components or {}, kinds):
        for kind, entries in source.items():
            if kind not in _components:
                raise ValueError(unknown_name("kind of component", kind, KINDS))
            for name, entry in entries.items():
                factory = import_attribute(entry) if isinstance(entry, str) else entry
                if not name or ":" in name:
                    raise ValueError(f"{kind} {name!r}: a name is not empty and has no ':' (that is an import path)")
                if not callable(factory):
                    raise ValueError(f"{kind} {name!r}: {type(factory).__name__} cannot be called to make one")
                known = _components[kind].get(name)
                if known is not None and known is not factory and not replace:
                    raise ValueError(f"{kind} {name!r} is registered already; pass replace=True to change its meaning")
                found.append((kind, name, factory))
    # Only now, so that a mistake registers nothing.
    for kind, name, factory in found:
        _components[kind][name] = factory


def is_registered(kind: str, name: str) -> bool:
    """Whether a name (not an import path) stands for something."""
    return name in _components[kind]


def find_component(kind: str, name: str) -> Factory:
    """What a registered name or an import path stands for.

    Raises:
        ValueError: The name is unknown (the nearest is suggested) or the path cannot be imported.
    """
    if ":" in name:
        found = import_attribute(name)
        if not callable(found):
            raise ValueError(f"{kind} {name!r}: a {type(found).__name__}, which cannot be called")
        factory: Factory = found
        return factory
    known = _components[kind]
    if name not in known:
        raise ValueError(unknown_name(kind, name, known) + "; or give an import path 'package.module:attribute'")
    return known[name]


def import_attribute(path: str) -> Any:
    """Import ``package.module:attribute`` (the attribute may be dotted).

    Raises:
        ValueError: The text is not of that form, or the module or the attribute does not exist.
    """
    module_name, _, attribute = path.partition(":")
    parts = [*module_name.split("."), *attribute.split(".")]
    if not attribute or not all(part.isidentifier() for part in parts):
        raise ValueError(f"{path!r} is not an import path of the form 'package.module:attribute'")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            hint = "; install its package, or name its directory in PYTHONPATH"
        raise ValueError(f"{path!r}: cannot import {module_name} ({error}){hint}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [known for known in dir(found) if not known.startswith("_")]
            raise ValueError(f"{path!r}: {unknown_name('attribute', name, public[:200])}")
        found = getattr(found, name)
    return found


def split_spec(kind: str, spec: str | Mapping[str, Any]) -> tuple[Factory, dict[str, Any]]:
    """The factory and the arguments that ``"name"`` or ``{"name": ..., **arguments}`` stand for.

    Raises:
        ValueError: There is no name, or it is unknown.
    """
    if isinstance(spec, str):
        return find_component(kind, spec), {}
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"{kind}: which one? Give its name, as in {{'name': ..., 'some_argument': ...}}")
    return find_component(kind, name), arguments


def call(kind: str, factory: Factory, *positional: Any, **arguments: Any) -> Any:
    """Call a factory after checking the arguments against its signature.

    Raises:
        ValueError: An argument is unknown (the nearest is suggested) or missing.
    """
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some built-in callables have none
        return factory(*positional, **arguments)
    parameters = signature.parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][len(positional) :]
        for argument in arguments:
            if argument not in named:
                raise ValueError(f"{kind} {_name(factory)}: {unknown_name('argument', argument, named)}")
    try:
        signature.bind(*positional, **arguments)
    except TypeError as error:
        raise ValueError(f"{kind} {_name(factory)}: {error}") from None
    return factory(*positional, **arguments)


def build_function(kind: str, spec: Any) -> Callable[..., Any]:
    """A transform, loss or collate function from a callable, a name, or ``{"name": ..., **arguments}``.

    A class is instantiated with the arguments (``torch.nn:CrossEntropyLoss``); a plain function keeps them for each
    call (``torch.nn.functional:mse_loss``).
    """
    if callable(spec):
        function: Callable[..., Any] = spec
        return function
    if not isinstance(spec, str | Mapping):
        raise ValueError(f"{kind}: expected a callable, a name or a table with a name, got {type(spec).__name__}")
    factory, arguments = split_spec(kind, spec)
    if inspect.isclass(factory):
        made: Callable[..., Any] = call(kind, factory, **arguments)
        return made
    return functools.partial(factory, **arguments) if arguments else factory


def build_optimizer(spec: Any, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over a model's trainable parameters.

    Args:
        spec: An instance (used as it is), a factory called with the list of trainable parameters, a name, or
            ``{"name": "adamw", "lr": 1e-3, ...}``.
        model: Whose parameters.

    Raises:
        ValueError: The model has nothing to train, the specification is unclear, or an instance holds none of the
            model's parameters (one made for another model, for example).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient, so there is nothing to train")
    if isinstance(spec, torch.optim.Optimizer):
        mine = {id(parameter) for parameter in trainable}
        if not any(id(parameter) in mine for group in spec.param_groups for parameter in group["params"]):
            raise ValueError("the optimizer holds none of the model's parameters; make it from model.parameters()")
        return spec
    if isinstance(spec, str | Mapping):
        factory, arguments = split_spec("optimizer", spec)
        made = call("optimizer", factory, trainable, **arguments)
    elif callable(spec):
        made = spec(trainable)
    else:
        raise ValueError(
            "train mode needs an optimizer: an instance, a factory over parameters, or a table such as "
            f"{{'name': 'adamw', 'lr': 1e-3}}; got {'nothing' if spec is None else type(spec).__name__}"
        )
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(f"the optimizer factory made a {type(made).__name__}, not a torch.optim.Optimizer")
    return made


def _name(factory: Factory) -> str:
    return getattr(factory, "__name__", type(factory).__name__)
