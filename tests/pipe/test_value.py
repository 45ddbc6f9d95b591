import json
import math
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipe.value import flatten, structure_from_json, structure_to_json, to_device, unflatten

Point = namedtuple("Point", ["x", "y"])

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
tensors = st.builds(
    lambda shape: torch.arange(math.prod(shape)).reshape(shape), st.lists(st.integers(0, 3), max_size=3)
)
keys = plain.filter(lambda key: key == key)
nests = st.recursive(
    plain | tensors,
    lambda child: (
        st.lists(child, max_size=4)
        | st.lists(child, max_size=4).map(tuple)
        | st.dictionaries(keys, child, max_size=4)
        | st.dictionaries(keys, child, max_size=4).map(OrderedDict)
        | st.builds(Point, child, child)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type and content all the way down; 0.0 and -0.0 differ, NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return a is b
    if hasattr(a, "_fields"):
        return type(a).__name__ == type(b).__name__ and a._fields == b._fields and same(tuple(a), tuple(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return all(map(same, a, b)) and len(a) == len(b) and all(map(same, a.values(), b.values()))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return bool(a == b)


@given(nests)
def test_what_is_taken_apart_comes_together_again(value: Any) -> None:
    structure, tensors = flatten(value)
    assert same(value, unflatten(structure, tensors))


@given(nests)
def test_structures_travel_as_json(value: Any) -> None:
    structure, tensors = flatten(value)
    text = json.dumps(structure_to_json(structure), allow_nan=False)
    arrived = structure_from_json(json.loads(text))
    assert arrived == structure
    assert same(value, unflatten(arrived, tensors))


@given(nests, nests)
def test_equal_structures_mean_equal_plain_values(a: Any, b: Any) -> None:
    """Structures are dictionary keys: 1, 1.0 and True, or 0.0 and -0.0, must not be taken for each other."""
    (first, tensors), (second, others) = flatten(a), flatten(b)
    if first == second:
        assert same(unflatten(first, tensors), unflatten(second, tensors))
        assert len(tensors) == len(others)


def test_values_that_compare_equal_have_structures_of_their_own() -> None:
    structures = [flatten(value)[0] for value in (1, 1.0, True, 0, 0.0, -0.0, False, "1", None)]
    assert len(set(structures)) == len(structures)


def test_shared_tensors_are_listed_at_each_place() -> None:
    x = torch.ones(2)
    assert [t is x for t in flatten((x, {"again": x}))[1]] == [True, True]


class Weird:
    pass


class Name(str):
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (Weird(), r"^the output is of unsupported type .*Weird"),
        ({"a": [1, (2, Weird())]}, r"^the output\['a'\]\[1\]\[1\] is of unsupported type"),
        ([Point(1, {2, 3})], r"^the output\[0\]\[1\] is of unsupported type builtins.set"),
        ({"a": Name("b")}, r"^the output\['a'\] is of unsupported type .*Name"),
        ({frozenset(): 1}, r"^the output\[frozenset\(\)\] is under a key of unsupported type frozenset"),
        ([torch.eye(2).to_sparse()], r"^the output\[0\] is a tensor of layout torch.sparse_coo"),
        ([torch.empty(2, device="meta")], r"^the output\[0\] is a tensor on the meta device"),
    ],
)
def test_what_cannot_travel_is_named_with_its_place(value: Any, where: str) -> None:
    with pytest.raises(ValueError, match=where):
        flatten(value, what="the output")


def test_a_nest_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="does it contain itself"):
        flatten(loop)


def test_the_number_of_tensors_must_fit() -> None:
    structure, tensors = flatten([torch.ones(1), torch.ones(2)])
    with pytest.raises(ValueError, match="more places than there are tensors"):
        unflatten(structure, tensors[:1])
    with pytest.raises(ValueError, match="3 tensors are more than"):
        unflatten(structure, [*tensors, tensors[0]])


def test_moving_keeps_the_nest_and_leaves_strangers_alone() -> None:
    stranger = Weird()
    moved = to_device(
        {"a": [torch.ones(2), Point(torch.zeros(1), stranger)], "b": OrderedDict(c=1)}, torch.device("meta")
    )
    assert moved["a"][0].is_meta
    assert moved["a"][1].x.is_meta
    assert moved["a"][1].y is stranger
    assert type(moved["b"]) is OrderedDict
