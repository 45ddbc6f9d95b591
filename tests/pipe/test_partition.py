"""Partitions against a search of all divisions."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.partition import balance, check_method, partition

NAMES = ["Embedding", "Block", "BLOCK2", "Block", "norm", "Linear"]
COUNTS = [50, 10, 10, 10, 0, 50]


def _parts(weights: list[int], bounds: tuple[int, ...]) -> list[int]:
    return [sum(weights[a:b]) for a, b in itertools.pairwise(bounds)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
def test_the_largest_part_is_as_small_as_any_division_makes_it(weights: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(weights)))
    every = [(0, *cuts, len(weights)) for cuts in itertools.combinations(range(1, len(weights)), parts - 1)]
    smallest = min(max(_parts(weights, bounds)) for bounds in every)
    found = balance(weights, parts)
    assert found in every
    assert max(_parts(weights, found)) == smallest
    # Among those, the smallest sum of squares, up to the small weight of even layer counts.
    squares = [sum(p * p for p in _parts(weights, b)) for b in every if max(_parts(weights, b)) == smallest]
    slack = 1e-5 * max(smallest, 1) ** 2
    assert sum(p * p for p in _parts(weights, found)) <= min(squares) + slack
    assert balance(weights, parts) == found


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.data())
def test_measured_times_balance_too(weights: list[float], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(weights)))
    bounds = balance(weights, parts)
    every = [(0, *cuts, len(weights)) for cuts in itertools.combinations(range(1, len(weights)), parts - 1)]
    smallest = min(max(sum(weights[a:b]) for a, b in itertools.pairwise(e)) for e in every)
    assert max(sum(weights[a:b]) for a, b in itertools.pairwise(bounds)) == pytest.approx(smallest, rel=1e-9, abs=1e-6)


@given(st.integers(1, 40), st.data())
def test_uniform_parts_differ_by_at_most_one(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    bounds = partition("uniform", stages, names=["L"] * layers, parameter_counts=[7] * layers)
    sizes = {b - a for a, b in itertools.pairwise(bounds)}
    assert len(bounds) == stages + 1
    assert sizes <= {layers // stages, -(-layers // stages)}


def test_huge_counts_stay_exact() -> None:
    # As 64-bit floats both sums would be equal.
    big = 1 << 60
    assert balance([big, 1, big], 2) in {(0, 1, 3), (0, 2, 3)}
    assert balance([big + 1, big, 2], 2) == (0, 1, 3)
    assert balance([2, big, big + 1], 2) == (0, 2, 3)


@pytest.mark.parametrize(
    ("method", "stages", "bounds"),
    [
        ("uniform", 2, (0, 3, 6)),
        # The norm without weights could lie on either side: layers 3 and 2 are more even than 4 and 1.
        ("parameters", 3, (0, 1, 4, 6)),
        ("Parameters", 1, (0, 6)),
        ([0, 1, 2, 6], 3, (0, 1, 2, 6)),
    ],
)
def test_methods(method: Any, stages: int, bounds: tuple[int, ...]) -> None:
    assert partition(method, stages, names=NAMES, parameter_counts=COUNTS) == bounds


@pytest.mark.parametrize(
    ("pattern", "stages", "matching"), [("block", 3, [1, 2, 3]), ("^block$", 2, [1, 3]), ("norm|Emb", 2, [0, 4])]
)
def test_types_are_shared_out_evenly(pattern: str, stages: int, matching: list[int]) -> None:
    bounds = partition(f"type:{pattern}", stages, names=NAMES, parameter_counts=COUNTS)
    assert [sum(a <= i < b for i in matching) for a, b in itertools.pairwise(bounds)] == [1] * stages


@pytest.mark.parametrize(
    ("method", "stages", "message"),
    [
        ("uniform", 7, "7 pipeline stages need at least 7 layers, the model has 6; use at most 6"),
        ("uniform", 0, "num_stages must be at least 1, got 0"),
        ("paramaters", 2, "unknown partition_method 'paramaters'; did you mean 'parameters'"),
        ("profile", 2, "'profile' needs the time of each layer.*use 'parameters'"),
        ("type:conv", 2, "matches no layer; the model's layer types are BLOCK2, Block, Embedding, Linear, norm"),
        ("type:(", 2, "malformed regular expression"),
        ("type:", 2, "matches no layer"),
        ([0, 6], 2, r"2 stages need 3 partition bounds .* got 2: \[0, 6\]"),
        ([0, 3, 5], 2, r"end at the number of layers, 6, got \[0, 3, 5\]"),
        ([1, 3, 6], 2, "must start at 0"),
        ([0, 4, 4, 6], 3, r"must increase: stage 1 would hold layers 4 to 3"),
        ([0, 3.0, 6], 2, "must be integers"),
    ],
)
def test_bad_methods(method: Any, stages: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(method, stages, names=NAMES, parameter_counts=COUNTS)


@pytest.mark.parametrize("method", ["unknown", "type:conv", [], [0], [0, 2]])
def test_some_faults_show_before_the_stages_are_known(method: Any) -> None:
    with pytest.raises(ValueError, match=r"partition"):
        check_method(method, NAMES)


def test_weights_must_be_numbers_that_add_up() -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        balance([1.0, float("nan")], 2)
    with pytest.raises(ValueError, match="finite and not negative"):
        balance([1, -1], 2)
