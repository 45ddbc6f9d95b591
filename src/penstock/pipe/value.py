"""Stage values taken apart and put together again: any nest of containers, tensors and plain values.

:func:`flatten` gives a *structure* and the tensors in the order in which they are met; :func:`unflatten` inverts it.
A structure is a nest of tuples made only of strings, integers and tuples, so it is hashable, compares exactly
(``1``, ``1.0`` and ``True`` stay apart, so do ``0.0`` and ``-0.0``) and travels as JSON:

====================================  =======================================================
value                                 structure
====================================  =======================================================
tensor                                ``("t",)``
None, bool, int, float, str           ``("z",)``, ``("b", 0)``, ``("i", 5)``, ``("f", "0x1.8p+0")``, ``("s", "text")``
tuple, list                           ``("u", child, ...)``, ``("l", child, ...)``
dict, OrderedDict                     ``("d", (key, child), ...)``, ``("o", (key, child), ...)``
named tuple                           ``("n", ("Name", "field", ...), child, ...)``
====================================  =======================================================

A named tuple arrives as one of the same name and fields; the receiver loads no class by name. Keys of dicts are plain
values or tuples of them.
"""

import json
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

Structure = tuple[Any, ...]

_MAX_DEPTH: Final = 64
_TENSOR: Final[Structure] = ("t",)
_NONE: Final[Structure] = ("z",)
_TENSOR_TYPES: Final = (Tensor, torch.nn.Parameter)
_SUPPORTED: Final = "tuples, lists, dicts, named tuples, tensors, None, bool, int, float and str"


class _Unsupported(Exception):  # noqa: N818  - it never leaves this module
    """Carries the path to the offending object up, innermost part first."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        self.path: list[str] = []


def flatten(value: Any, *, what: str = "value") -> tuple[Structure, list[Tensor]]:
    """Take a value apart.

    Args:
        value: Any nest of tuples, lists, dicts, named tuples, dense tensors and plain values.
        what: How an error calls the value.

    Returns:
        The structure and the tensors, in depth-first order; the same tensor met twice is listed twice.

    Raises:
        ValueError: An object of another type; the message says where it sits in the nest.
    """
    tensors: list[Tensor] = []
    try:
        return _flatten(value, tensors, 0), tensors
    except _Unsupported as error:
        where = what + "".join(reversed(error.path))
        raise ValueError(f"{where} is {error.problem}; a stage may pass on any nest of {_SUPPORTED}") from None


def unflatten(structure: Structure, tensors: Sequence[Tensor]) -> Any:
    """Put a value together again from :func:`flatten`'s answer."""
    rest = iter(tensors)
    value = _unflatten(structure, rest)
    if next(rest, None) is not None:
        raise ValueError(f"{len(tensors)} tensors are more than the structure has places for")
    return value


def structure_to_json(structure: Structure) -> Any:
    """The structure as a JSON value (tuples become lists)."""
    return [structure_to_json(part) if isinstance(part, tuple) else part for part in structure]


def structure_from_json(value: Any) -> Structure:
    """Inverse of :func:`structure_to_json`."""
    return tuple(structure_from_json(part) if isinstance(part, list) else part for part in value)


def to_device(value: Any, device: torch.device) -> Any:
    """The same nest with its tensors on ``device``; objects of unknown types are left as they are."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest with ``function`` applied to its tensors; objects of unknown types are left as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, item) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, map_tensors(function, item)) for key, item in value.items())
    if _is_named_tuple(value):
        return type(value)(*(map_tensors(function, item) for item in value))
    return value


def _flatten(value: Any, tensors: list[Tensor], depth: int) -> Structure:
    kind = type(value)
    if kind in _TENSOR_TYPES:
        _check_tensor(value)
        tensors.append(value)
        return _TENSOR
    plain = _plain(value)
    if plain is not None:
        return plain
    if depth == _MAX_DEPTH:
        raise _Unsupported(f"nested more than {_MAX_DEPTH} deep (does it contain itself?)")
    if kind is dict or kind is OrderedDict:
        return ("d" if kind is dict else "o", *_flatten_items(value, tensors, depth))
    if kind is tuple or kind is list or kind is torch.Size:
        return ("l" if kind is list else "u", *_flatten_sequence(value, tensors, depth))
    if _is_named_tuple(value):
        return ("n", (kind.__name__, *kind._fields), *_flatten_sequence(value, tensors, depth))
    raise _Unsupported(f"of unsupported type {kind.__module__}.{kind.__qualname__}")


def _flatten_sequence(value: Sequence[Any], tensors: list[Tensor], depth: int) -> Iterator[Structure]:
    for index, item in enumerate(value):
        try:
            yield _flatten(item, tensors, depth + 1)
        except _Unsupported as error:
            error.path.append(f"[{index}]")
            raise


def _flatten_items(value: dict[Any, Any], tensors: list[Tensor], depth: int) -> Iterator[Structure]:
    for key, item in value.items():
        try:
            name = _key(key)
            if name is None:
                raise _Unsupported(f"under a key of unsupported type {type(key).__qualname__}")
            yield (name, _flatten(item, tensors, depth + 1))
        except _Unsupported as error:
            error.path.append(f"[{key!r}]")
            raise


def _plain(value: Any) -> Structure | None:
    """The structure of a plain value, None for anything else. Types are matched exactly: no enum, no subclass."""
    if value is None:
        return _NONE
    kind = type(value)
    if kind is bool:
        return ("b", int(value))
    if kind is int:
        return ("i", value)
    if kind is float:
        return ("f", value.hex())
    if kind is str:
        return ("s", value)
    return None


def _key(key: Any) -> Structure | None:
    if type(key) is tuple:
        parts = [_key(part) for part in key]
        return None if None in parts else ("u", *parts)
    return _plain(key)


def _check_tensor(tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise _Unsupported(f"a tensor of layout {tensor.layout} (call to_dense() first)")
    if tensor.is_quantized:
        raise _Unsupported("a quantized tensor (call dequantize() first)")
    if tensor.is_meta:
        raise _Unsupported("a tensor on the meta device, which has no data")


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and isinstance(getattr(value, "_fields", None), tuple)


def _unflatten(structure: Structure, tensors: Iterator[Tensor]) -> Any:
    kind = structure[0]
    match kind:
        case "t":
            tensor = next(tensors, None)
            if tensor is None:
                raise ValueError("the structure has more places than there are tensors")
            return tensor
        case "z":
            return None
        case "b":
            return bool(structure[1])
        case "i" | "s":
            return structure[1]
        case "f":
            return float.fromhex(structure[1])
        case "u":
            return tuple(_unflatten(child, tensors) for child in structure[1:])
        case "l":
            return [_unflatten(child, tensors) for child in structure[1:]]
        case "d":
            return {_unflatten(key, tensors): _unflatten(child, tensors) for key, child in structure[1:]}
        case "o":
            return OrderedDict((_unflatten(key, tensors), _unflatten(child, tensors)) for key, child in structure[1:])
        case "n":
            return _named_tuple(json.dumps(structure[1]))(*(_unflatten(child, tensors) for child in structure[2:]))
    raise ValueError(f"{kind!r} is no kind of structure")


@lru_cache(maxsize=256)
def _named_tuple(names: str) -> Any:
    typename, *fields = json.loads(names)
    return namedtuple(typename, fields)
