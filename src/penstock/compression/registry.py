"""Compression algorithms by name."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penstock._core.suggest import unknown_name
from penstock.compression.algorithm import CompressionAlgorithm, option_names
from penstock.compression.algorithms import Bf16, Fp16, NoCompression, OneBit

if TYPE_CHECKING:
    from penstock.compression.module import CompressionModule

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
    """The registered names, sorted."""
    return sorted(_classes)


def get_compression_class(name: str) -> type[CompressionAlgorithm]:
    """The class registered under a name; an unknown one raises ``ValueError`` with the known names."""
    try:
        return _classes[name]
    except KeyError:
        raise ValueError(unknown_name("compression algorithm", name, _classes)) from None


def create_compression_algorithm(name: str, config: Mapping[str, Any] | None = None) -> CompressionAlgorithm:
    """Make an algorithm from its name and its options, ``{"block_size": 2048}`` for ``"onebit"`` for example.

    Raises:
        ValueError: The name or an option is unknown (the message lists the known ones), a value is out of range, or
            the class keeps an option under another name than it takes it (:meth:`CompressionAlgorithm.options`).
    """
    cls = get_compression_class(name)
    options = dict(config or {})
    known = option_names(cls)
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of compression algorithm {name!r}:", option, known))
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


for _cls in (NoCompression, Fp16, Bf16, OneBit):
    register_compression_module(_cls.name, _cls)
