"""Compression algorithms by name.

A package makes its own known by an entry point in the group ``penstock.compression``: the name, and the class. Entry
points are looked at when a name is asked for that is not known otherwise, or the names are listed.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from penstock._core.suggest import unknown_name
from penstock.compression.algorithm import CompressionAlgorithm, option_names, required_options
from penstock.compression.algorithms import BUILT_IN

if TYPE_CHECKING:
    from penstock.compression.module import CompressionModule

ENTRY_POINTS: Final = "penstock.compression"

_classes: dict[str, type[CompressionAlgorithm]] = {}


def register_compression_module(name: str, cls: type[CompressionAlgorithm]) -> None:
    """Make an algorithm class known under a name. Registering the same class again does nothing.

    Raises:
        ValueError: The name is taken by another class, is not the class's own ``name``, or ``cls`` is not a complete
            algorithm class.
    """
    if not isinstance(cls, type) or not issubclass(cls, CompressionAlgorithm):
        raise ValueError(f"cannot register {cls!r} as {name!r}: not a subclass of CompressionAlgorithm")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ValueError(f"cannot register {cls.__name__} as {name!r}: it does not implement {missing}")
    if not name:
        raise ValueError(f"cannot register {cls.__name__} under an empty name")
    taken = _classes.get(name, cls)
    if taken is not cls:
        raise ValueError(
            f"compression algorithm {name!r} is already registered as {taken.__module__}.{taken.__qualname__}; "
            f"register {cls.__module__}.{cls.__qualname__} under another name"
        )
    own = getattr(cls, "name", None)
    if own != name:  # a compressed file keeps the class's own name, by which it must be found again
        raise ValueError(f"cannot register {cls.__name__} as {name!r}: its attribute name is {own!r}; make them equal")
    _classes[name] = cls


def known_algorithms() -> list[str]:
    """The registered names, those of installed packages included, sorted."""
    _register_installed()
    return sorted(_classes)


def algorithms_without_options() -> tuple[list[str], list[str]]:
    """Names of the algorithms that can be made without options, and of those that cannot."""
    names = known_algorithms()
    needing = [name for name in names if required_options(_classes[name])]
    return [name for name in names if name not in needing], needing


def get_compression_class(name: str) -> type[CompressionAlgorithm]:
    """The class registered under a name; an unknown one raises ``ValueError`` with the known names."""
    if name not in _classes:
        _register_installed()
    try:
        return _classes[name]
    except KeyError:
        raise ValueError(unknown_name("compression algorithm", name, _classes)) from None


@cache
def _register_installed() -> None:
    """Register the classes that installed packages offer by entry points; once.

    Raises:
        ValueError: One cannot be imported or registered; the message names the package.
    """
    for point in entry_points(group=ENTRY_POINTS):
        package = point.dist.name if point.dist is not None else "an unknown package"
        try:
            register_compression_module(point.name, point.load())
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the entry point {point.name} = {point.value} ({ENTRY_POINTS}) of {package} is no compression "
                f"algorithm: {error}; mend or uninstall the package"
            ) from error


def create_compression_algorithm(name: str, config: Mapping[str, Any] | None = None) -> CompressionAlgorithm:
    """Make an algorithm from its name and its options, ``{"block_size": 2048}`` for ``"onebit"`` for example.

    Raises:
        ValueError: The name or an option is unknown (the message lists the known ones), an option that has no default
            is missing, a value is out of range, or the
            class keeps an option under another name than it takes it (:meth:`CompressionAlgorithm.options`).
    """
    cls = get_compression_class(name)
    options = dict(config or {})
    known = option_names(cls)
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of compression algorithm {name!r}:", option, known))
    missing = [option for option in required_options(cls) if option not in options]
    if missing:
        raise ValueError(f"compression algorithm {name!r} needs the option {', '.join(missing)}, which has no default")
    algorithm = cls(**options)
    for option in known:
        if not hasattr(algorithm, option):
            raise ValueError(
                f"{cls.__name__} takes the option {option!r} but has no attribute of that name; set self.{option}, so "
                "that files and checkpoints can say how the algorithm was made"
            )
    return algorithm


def get_compression_module(name: str, config: Mapping[str, Any] | None = None) -> "CompressionModule":
    """A :class:`CompressionModule` (error memory, statistics, state) around an algorithm made from name and options."""
    from penstock.compression.module import CompressionModule

    return CompressionModule(create_compression_algorithm(name, config))


for _cls in BUILT_IN:
    register_compression_module(_cls.name, _cls)
