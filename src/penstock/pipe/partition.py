"""Divide a list of layers into stages."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock._core.suggest import unknown_name

METHODS: Final = ("uniform", "parameters", "type:<regex>", "profile", "a list of bounds")
MEASURED: Final = "profile"
"""The method whose bounds are known only when layers have been measured."""

_EVENNESS: Final = 1e-6
"""Weight of even layer counts beside even weights, where several divisions have the same largest stage."""


def partition(
    method: str | Sequence[int], num_stages: int, *, names: Sequence[str], parameter_counts: Sequence[int]
) -> tuple[int, ...]:
    """Divide layers into stages by a named method.

    Args:
        method: ``"uniform"`` (layers), ``"parameters"`` (trainable parameters), ``"type:regex"`` (layers whose name
            matches the regular expression anywhere, upper or lower case), or the bounds themselves.
        num_stages: How many stages.
        names: For each layer, the name of its class or function.
        parameter_counts: For each layer, its trainable parameters.

    Returns:
        ``num_stages + 1`` bounds: stage ``s`` holds layers ``bounds[s]`` to ``bounds[s + 1] - 1``.

    Raises:
        ValueError: More stages than layers, an unknown method, a regular expression that is malformed or matches no
            layer, or bounds that do not fit.
    """
    check_num_stages(num_stages, len(names))
    if not isinstance(method, str):
        return check_bounds(method, num_stages, len(names))
    return balance(_weights(method, names, parameter_counts), num_stages)


def check_num_stages(num_stages: int, num_layers: int) -> None:
    """Refuse fewer than one stage and more stages than layers."""
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1, got {num_stages}")
    if num_stages > num_layers:
        raise ValueError(
            f"{num_stages} pipeline stages need at least {num_stages} layers, the model has {num_layers}; "
            f"use at most {num_layers} stages or split the layers more finely"
        )


def check_method(method: str | Sequence[int], names: Sequence[str]) -> None:
    """Refuse a method that no number of stages could make right; errors as for :func:`partition`."""
    if method == MEASURED:
        return
    if isinstance(method, str):
        _weights(method, names, [0] * len(names))
    else:
        check_bounds(method, len(method) - 1, len(names))


def check_bounds(bounds: Sequence[int], num_stages: int, num_layers: int) -> tuple[int, ...]:
    """Bounds given by hand, checked.

    Raises:
        ValueError: Not ``num_stages + 1`` increasing integers from 0 to ``num_layers``.
    """
    given = list(bounds)
    if not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in given):
        raise ValueError(f"partition bounds must be integers, got {given}")
    if len(given) != num_stages + 1:
        raise ValueError(
            f"{num_stages} stages need {num_stages + 1} partition bounds (the first layer of each, then the number of "
            f"layers), got {len(given)}: {given}"
        )
    if len(given) < 2 or given[0] != 0 or given[-1] != num_layers:
        raise ValueError(f"partition bounds must start at 0 and end at the number of layers, {num_layers}, got {given}")
    for stage, (start, stop) in enumerate(pairwise(given)):
        if start >= stop:
            raise ValueError(
                f"partition bounds must increase: stage {stage} would hold layers {start} to {stop - 1}, got {given}"
            )
    return tuple(given)


def balance(weights: Sequence[int] | Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Divide a sequence into consecutive non-empty parts so that the heaviest part is as light as possible.

    Among the divisions with the lightest heaviest part, the one with the smallest sum of squared part weights is taken
    (so ten equal layers on four stages give 3, 3, 2, 2 in some order and not 3, 3, 3, 1), then the most even in
    layers, then the one whose last part starts earliest. The result depends on nothing but the arguments.

    Args:
        weights: One non-negative number for each element. Integers are compared exactly.
        num_stages: How many parts; at most ``len(weights)``.

    Returns:
        ``num_stages + 1`` increasing bounds from 0 to ``len(weights)``.
    """
    check_num_stages(num_stages, len(weights))
    values = np.asarray(weights)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError(f"weights must be finite and not negative, got {list(weights)}")
    prefix = np.concatenate([np.zeros(1, dtype=values.dtype), np.cumsum(values)])
    count = len(weights)
    largest = _lightest_maximum(prefix, num_stages)
    scale = float(largest) if largest > 0 else 1.0

    # best[i]: lowest cost of dividing the first i elements into the parts so far.
    # cuts[part][i]: where the last of those parts starts.
    index = np.arange(count + 1)
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    cuts = np.zeros((num_stages + 1, count + 1), dtype=np.int64)
    for part in range(1, num_stages + 1):
        improved = np.full(count + 1, np.inf)
        for stop in range(part, count - (num_stages - part) + 1):
            part_weights = prefix[stop] - prefix[:stop]
            cost = (part_weights / scale) ** 2 + _EVENNESS * ((stop - index[:stop]) / count) ** 2
            total = np.where(part_weights <= largest, best[:stop] + cost, np.inf)
            start = int(np.argmin(total))
            improved[stop] = total[start]
            cuts[part, stop] = start
        best = improved
    bounds = [count]
    for part in range(num_stages, 0, -1):
        bounds.append(int(cuts[part, bounds[-1]]))
    return tuple(reversed(bounds))


def _lightest_maximum(prefix: npt.NDArray[Any], num_stages: int) -> int | float:
    """The smallest possible weight of the heaviest of ``num_stages`` non-empty parts."""
    count = len(prefix) - 1
    # lightest[i]: for the parts so far, over the first i elements. One part: its own weight.
    lightest = prefix.copy()
    for part in range(2, num_stages + 1):
        improved = lightest.copy()
        for stop in range(part, count + 1):
            starts = slice(part - 1, stop)
            improved[stop] = np.maximum(lightest[starts], prefix[stop] - prefix[starts]).min()
        lightest = improved
    value: int | float = lightest[count].item()
    return value


def _weights(method: str, names: Sequence[str], parameter_counts: Sequence[int]) -> list[int]:
    lowered = method.lower()
    if lowered == "uniform":
        return [1] * len(names)
    if lowered == "parameters":
        return list(parameter_counts)
    if lowered.startswith("type:"):
        return _matches(method[len("type:") :], names)
    if lowered == MEASURED:
        raise ValueError(
            "partition_method 'profile' needs the time of each layer, which penstock.initialize measures in a run of "
            "several stages; without one use 'parameters', 'uniform', 'type:<regex>' or a list of bounds"
        )
    raise ValueError(unknown_name("partition_method", method, METHODS))


def _matches(pattern: str, names: Sequence[str]) -> list[int]:
    try:
        expression = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"partition_method 'type:{pattern}': malformed regular expression ({error})") from error
    found = [int(expression.search(name) is not None) for name in names]
    if not pattern or not any(found):
        raise ValueError(
            f"partition_method 'type:{pattern}' matches no layer; the model's layer types are "
            f"{', '.join(sorted(set(names)))}"
        )
    return found
