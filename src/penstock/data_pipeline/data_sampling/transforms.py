"""What is done to samples after they are chosen: named transforms, and the user's own functions.

A transform works on one sample (:func:`truncate`, :func:`pad`, :func:`normalise`) or, like :func:`pack`, on all.
Samples are sequences of numbers: lists, arrays or CPU tensors; they come out as arrays.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.suggest import unknown_name

Array = npt.NDArray[Any]
SampleTransform = Callable[[Any], Any]
ListTransform = Callable[[Sequence[Any]], list[Any]]


def truncate(length: int) -> ListTransform:
    """Keep the first ``length`` elements of each sample."""
    _at_least_one("truncate", length)
    return per_sample(lambda sample: _as_array(sample)[:length])


def pad(length: int, value: float = 0) -> ListTransform:
    """Append ``value`` to each sample up to ``length`` elements; longer samples stay as they are."""
    _at_least_one("pad", length)

    def one(sample: Any) -> Array:
        found = _as_array(sample)
        missing = max(0, length - len(found))
        filler = np.empty((missing, *found.shape[1:]), dtype=found.dtype)
        filler[...] = _fitting("pad: the value", value, found.dtype)
        return np.concatenate([found, filler])

    return per_sample(one)


def normalise(mean: float | None = None, std: float | None = None) -> ListTransform:
    """Subtract ``mean`` and divide by ``std``, in float32 (float64 for float64 samples).

    What is not given is taken from each sample; a sample whose elements are all equal is only centred.
    """
    if std is not None and not std > 0:
        raise ValueError(f"normalise: std must be above 0, got {std}")

    def one(sample: Any) -> Array:
        found = _as_array(sample)
        exact = found.astype(np.float64)
        centre = mean if mean is not None else (exact.mean() if exact.size else 0.0)
        scale = std if std is not None else (exact.std() if exact.size else 1.0)
        result = (exact - centre) / (scale if scale > 0 else 1.0)
        return result.astype(np.float64 if found.dtype == np.float64 else np.float32)

    return per_sample(one)


def pack(length: int, separator: float | None = None, pad_value: float | None = None) -> ListTransform:
    """Lay all samples end to end and cut them into rows of exactly ``length`` elements.

    Args:
        length: Elements of a row.
        separator: Put after each sample, an end-of-text token for example; nothing if None.
        pad_value: Fill the last row with this; a last row that is not full is left out if None.
    """
    _at_least_one("pack", length)

    def all_of(samples: Sequence[Any]) -> list[Any]:
        parts: list[Array] = []
        for sample in samples:
            found = _as_array(sample)
            if found.ndim != 1:
                raise ValueError(f"pack: samples have one dimension, got the shape {found.shape}")
            parts.append(found)
            if separator is not None:
                parts.append(_fitting("pack: the separator", separator, found.dtype))
        if not parts:
            return []
        stream = np.concatenate(parts)
        missing = -len(stream) % length
        if pad_value is not None and missing:
            stream = np.concatenate(
                [stream, np.repeat(_fitting("pack: the pad_value", pad_value, stream.dtype), missing)]
            )
        return list(stream[: len(stream) // length * length].reshape(-1, length))

    return all_of


TRANSFORMS: Final[dict[str, Callable[..., ListTransform]]] = {
    "truncate": truncate,
    "pad": pad,
    "pack": pack,
    "normalise": normalise,
    "normalize": normalise,
}
"""The named transforms."""


def per_sample(function: SampleTransform) -> ListTransform:
    """A transform of all samples from a function of one."""
    return lambda samples: [function(sample) for sample in samples]


def build_transforms(entries: Iterable[str | Mapping[str, Any] | SampleTransform]) -> list[ListTransform]:
    """The transforms that a configuration lists: names, tables with a ``name`` and options, or functions.

    Raises:
        ValueError: A name or an option is unknown, or a needed option is missing or out of range.
    """
    return [_build(entry) for entry in entries]


def _build(entry: str | Mapping[str, Any] | SampleTransform) -> ListTransform:
    if callable(entry):
        return per_sample(entry)
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
