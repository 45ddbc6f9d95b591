"""What is done to samples after they are chosen: named transforms, and the user's own functions.

A transform works on one sample (:class:`Truncate`, :class:`Pad`, :class:`Normalise`) or, like :class:`Pack`, on all.
Samples are sequences of numbers: lists, arrays or CPU tensors; they come out as arrays.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.suggest import unknown_name

Array = npt.NDArray[Any]
SampleTransform = Callable[[Any], Any]
ListTransform = Callable[[Sequence[Any]], list[Any]]


@dataclass(frozen=True)
class Truncate:
    """Keep the first ``length`` elements of each sample."""

    length: int

    def __post_init__(self) -> None:
        _at_least_one("truncate", self.length)

    def __call__(self, samples: Sequence[Any]) -> list[Any]:
        """The samples, cut."""
        return [_as_array(sample)[: self.length] for sample in samples]


@dataclass(frozen=True)
class Pad:
    """Append ``value`` to each sample up to ``length`` elements; longer samples stay as they are."""

    length: int
    value: float = 0

    def __post_init__(self) -> None:
        _at_least_one("pad", self.length)

    def __call__(self, samples: Sequence[Any]) -> list[Any]:
        """The samples, padded."""
        return [self._one(_as_array(sample)) for sample in samples]

    def _one(self, found: Array) -> Array:
        missing = max(0, self.length - len(found))
        filler = np.empty((missing, *found.shape[1:]), dtype=found.dtype)
        filler[...] = _fitting("pad: the value", self.value, found.dtype)
        return np.concatenate([found, filler])


@dataclass(frozen=True)
class Normalise:
    """Subtract ``mean`` and divide by ``std``, in float32 (float64 for float64 samples).

    What is not given is taken from each sample; a sample whose elements are all equal is only centred.
    """

    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        if self.std is not None and not self.std > 0:
            raise ValueError(f"normalise: std must be above 0, got {self.std}")

    def __call__(self, samples: Sequence[Any]) -> list[Any]:
        """The samples, normalised."""
        return [self._one(_as_array(sample)) for sample in samples]

    def _one(self, found: Array) -> Array:
        exact = found.astype(np.float64)
        centre = self.mean if self.mean is not None else (exact.mean() if exact.size else 0.0)
        scale = self.std if self.std is not None else (exact.std() if exact.size else 1.0)
        result = (exact - centre) / (scale if scale > 0 else 1.0)
        return np.asarray(result, dtype=np.float64 if found.dtype == np.float64 else np.float32)


@dataclass(frozen=True)
class Pack:
    """Lay all samples end to end and cut them into rows of exactly ``length`` elements.

    Attributes:
        length: Elements of a row.
        separator: Put after each sample, an end-of-text token for example; nothing if None.
        pad_value: Fill the last row with this; a last row that is not full is left out if None.
    """

    length: int
    separator: float | None = None
    pad_value: float | None = None

    def __post_init__(self) -> None:
        _at_least_one("pack", self.length)

    def __call__(self, samples: Sequence[Any]) -> list[Any]:
        """The rows."""
        parts: list[Array] = []
        for sample in samples:
            found = _as_array(sample)
            if found.ndim != 1:
                raise ValueError(f"pack: samples have one dimension, got the shape {found.shape}")
            parts.append(found)
            if self.separator is not None:
                parts.append(_fitting("pack: the separator", self.separator, found.dtype))
        if not parts:
            return []
        stream = np.concatenate(parts)
        missing = -len(stream) % self.length
        if self.pad_value is not None and missing:
            filler = np.repeat(_fitting("pack: the pad_value", self.pad_value, stream.dtype), missing)
            stream = np.concatenate([stream, filler])
        return list(stream[: len(stream) // self.length * self.length].reshape(-1, self.length))


TRANSFORMS: Final[dict[str, Callable[..., ListTransform]]] = {
    "truncate": Truncate,
    "pad": Pad,
    "pack": Pack,
    "normalise": Normalise,
    "normalize": Normalise,
}
"""The named transforms."""


@dataclass(frozen=True)
class EachSample:
    """A transform of all samples from a function of one."""

    function: SampleTransform

    def __call__(self, samples: Sequence[Any]) -> list[Any]:
        """The function of each sample."""
        return [self.function(sample) for sample in samples]


@dataclass(frozen=True)
class Transforms:
    """Transforms in turn. It can be pickled where the user's own functions can, as spawned workers need."""

    steps: tuple[ListTransform, ...]

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __call__(self, data: Any) -> list[Any]:
        """The transformed samples of a list or another sequence."""
        samples = data if isinstance(data, list) else [data[index] for index in range(len(data))]
        for step in self.steps:
            samples = step(samples)
        return list(samples)


def build_transforms(entries: Iterable[str | Mapping[str, Any] | SampleTransform]) -> Transforms:
    """The transforms that a configuration lists: names, tables with a ``name`` and options, or functions.

    Raises:
        ValueError: A name or an option is unknown, or a needed option is missing or out of range.
    """
    return Transforms(tuple(_build(entry) for entry in entries))


def _build(entry: str | Mapping[str, Any] | SampleTransform) -> ListTransform:
    if callable(entry):
        return EachSample(entry)
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a transform is a name, a table with a 'name', or a function; got {entry!r}")
    if name not in TRANSFORMS:
        raise ValueError(unknown_name("transform", name, TRANSFORMS))
    factory = TRANSFORMS[name]
    parameters = inspect.signature(factory).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(f"transform {name!r}: {unknown_name('option', str(option), parameters)}")
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ValueError(f"transform {name!r} needs the option {parameter.name!r}")
    return factory(**options)


def _as_array(sample: Any) -> Array:
    found = np.asarray(sample)
    if found.ndim == 0 or found.dtype.kind not in "biuf":
        raise ValueError(
            f"this transform works on sequences of numbers, got {type(sample).__name__} "
            f"({found.dtype}, shape {found.shape}); give a function for other samples"
        )
    return found


def _fitting(what: str, value: float, dtype: np.dtype[Any]) -> Array:
    limits = np.iinfo(dtype) if dtype.kind in "iu" else None
    if limits is not None and (value != int(value) or not limits.min <= value <= limits.max):
        raise ValueError(f"{what} {value} cannot be stored in samples of {dtype}")
    return np.array([value], dtype=dtype)


def _at_least_one(name: str, length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{name}: length must be an integer of at least 1, got {length!r}")
