"""Configuration from files, dictionaries and the command line, checked against a pydantic model.

Three small functions that every configured part shares: :func:`read_mapping` (YAML or JSON to a dictionary),
:func:`apply_overrides` (``--set a.b=c``) and :func:`validate_config` (a dictionary to a model, with errors that name
the place and the nearest key).
"""

import json
import math
import os
import re
import types
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from penstock._core.suggest import unknown_name

ModelT = TypeVar("ModelT", bound=BaseModel)

_SUFFIXES: Final = (".yaml", ".yml", ".json")
_SHOWN_INPUT: Final = 80
_DEEPEST: Final = 100
_MOST_VALUES: Final = 1_000_000
_PLACE: Final = re.compile(r"[^.=\s]+(\.[^.=\s]+)*")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number (YAML 1.1 makes it a string) and a key may appear once."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= _DEEPEST:  # every level makes all further ones slower
            raise yaml.YAMLError("nested too deeply")
        super().fetch_flow_collection_start(token)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} appears twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """The plain value of a YAML text: numbers, strings, lists and dictionaries only.

    Raises:
        ValueError: The text is not YAML, holds a tag that would make an object, or repeats a key.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one more number format
        if _written_out(value, {}) > _MOST_VALUES:
            raise ValueError(f"not valid YAML here: its aliases stand for more than {_MOST_VALUES:,} values")
        return value
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None


def _written_out(value: Any, sizes: dict[int, float]) -> float:
    """How many values a value holds once its aliases are written out; infinite where one holds itself."""
    if not isinstance(value, list | dict | tuple | set):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = math.inf  # until it is known: whoever meets it on the way is inside of it
        parts = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(value)]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice")
        result[key] = value
    return result


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a configuration file: YAML (``.yaml``, ``.yml``) or JSON (``.json``) with a table at the top.

    Args:
        path: The file. An empty one is an empty configuration.

    Raises:
        ValueError: The file is missing, of another kind, malformed, repeats a key, or holds no table at the top.
    """
    file = Path(path)
    if file.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{file}: a configuration file ends in {', '.join(_SUFFIXES)}")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such configuration file") from None
    except IsADirectoryError:
        raise ValueError(f"{file}: a directory, not a configuration file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None
    try:
        if file.suffix.lower() == ".json":
            value = json.loads(text, object_pairs_hook=_once) if text.strip() else {}
        else:
            value = parse_yaml(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{file}: the top of a configuration is a table of names, found {type(value).__name__}")
    return value


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set values named on the command line, such as ``train.steps=100`` or ``optimizer.betas=[0.9, 0.95]``.

    Args:
        data: The configuration; it is not changed.
        overrides: ``place=value`` texts, applied in order. The place is a dotted path; tables on the way are created
            where missing, and a number steps into a list. The value is YAML (``null``, ``true``, ``1e-3``, ``[a, b]``).

    Returns:
        A copy of ``data`` with the values set.

    Raises:
        ValueError: An override is not of that form, or steps into something that is neither a table nor a list.
    """
    result: dict[str, Any] = _copy_tables(dict(data))
    for override in overrides:
        place, equals, text = override.partition("=")
        place = place.strip()
        if not equals or not _PLACE.fullmatch(place):
            raise ValueError(f"override {override!r} is not of the form a.b=value, for example train.steps=100")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"override {override!r}: the value is {error}") from None
        _set(result, place.split("."), value, override)
    return result


def _copy_tables(value: Any) -> Any:
    """Copy dictionaries and lists; keep everything else (a dataset or an optimizer) as the object it is."""
    if isinstance(value, dict):
        return {key: _copy_tables(entry) for key, entry in value.items()}
    if type(value) is list:
        return [_copy_tables(entry) for entry in value]
    return value


def _set(table: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    here: Any = table
    for depth, name in enumerate(path):
        last = depth == len(path) - 1
        at = ".".join(path[:depth]) or "the top"
        if isinstance(here, dict):
            if last:
                here[name] = value
            else:
                if here.get(name) is None:
                    here[name] = {}
                here = here[name]
        elif isinstance(here, list):
            if not name.isdecimal() or int(name) >= len(here):
                raise ValueError(
                    f"override {override!r}: {at} is a list of {len(here)}, so {name!r} must be a number below that"
                )
            if last:
                here[int(name)] = value
            else:
                here = here[int(name)]
        else:
            raise ValueError(
                f"override {override!r}: {at} holds {_shown(here)}, which has no {name!r} inside; override {at} itself"
            )


def validate_config(model_cls: type[ModelT], data: Any, source: str | os.PathLike[str] = "configuration") -> ModelT:
    """Check a dictionary against a pydantic model and say clearly what is wrong.

    Args:
        model_cls: The model; with ``extra="forbid"`` unknown keys are errors that suggest the nearest known one.
        data: The configuration as plain values, or a ``model_cls`` already.
        source: Where it comes from (a file name, for example), for the messages.

    Returns:
        The validated model.

    Raises:
        ValueError: Something is wrong; the message has a line per problem: the dotted place, what is wrong, the value.
    """
    if isinstance(data, model_cls):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(f"{source}: expected a table of names, got {_shown(data)}")
    try:
        return model_cls.model_validate(dict(data))
    except ValidationError as error:
        lines = [_explain(model_cls, dict(problem)) for problem in error.errors(include_url=False)]
    # Outside the handler, so that pydantic's own long report is not printed as the context.
    if len(lines) == 1:
        raise ValueError(f"{source}: {lines[0]}")
    raise ValueError("\n  ".join([f"{source}: {len(lines)} problems", *lines]))


def _explain(model_cls: type[BaseModel], problem: dict[str, Any]) -> str:
    location: tuple[int | str, ...] = problem["loc"]
    place = ".".join(str(part) for part in location)
    prefix = f"{place}: " if place else ""
    if problem["type"] == "extra_forbidden":
        known = sorted({name for model in _models_at(model_cls, location[:-1]) for name in _keys_of(model)})
        return prefix + unknown_name("key", str(location[-1]), known)
    if problem["type"] == "missing":
        return f"{prefix}required, but missing"
    if problem["type"] == "value_error":
        return f"{prefix}{problem['ctx']['error']}"
    return f"{prefix}{problem['msg']}, got {_shown(problem['input'])}"


def _models_at(model_cls: type[BaseModel], location: Sequence[int | str]) -> list[type[BaseModel]]:
    """The models that may stand at a place, found by following annotations from the root."""
    annotations: list[Any] = [model_cls]
    for part in location:
        following: list[Any] = []
        for annotation in annotations:
            following += _step(annotation, part)
        # A union's tag is a part of pydantic's location but no step in the data.
        annotations = following or annotations
    return [model for annotation in annotations for model in _models_in(annotation)]


def _step(annotation: Any, part: int | str) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        found = [field.annotation for name, field in annotation.model_fields.items() if part in (name, field.alias)]
        return [entry for entry in found if entry is not None]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _step(arguments[0], part)
    if origin in (Union, types.UnionType):
        return [entry for option in arguments for entry in _step(option, part)]
    if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
        return [arguments[1]]
    if isinstance(origin, type) and issubclass(origin, Sequence | set | frozenset) and isinstance(part, int):
        return [argument for argument in arguments if argument is not Ellipsis]
    return []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _models_in(arguments[0])
    if origin in (Union, types.UnionType):
        return [model for option in arguments for model in _models_in(option)]
    return []


def _keys_of(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_INPUT else text[: _SHOWN_INPUT - 1] + "…"
