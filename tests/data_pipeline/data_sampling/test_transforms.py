from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.data_sampling.transforms import build_transforms


def apply(entry: Any, samples: list[Any]) -> list[Any]:
    transform = build_transforms([entry])
    return transform(samples)


rows = st.lists(st.lists(st.integers(0, 99), max_size=7), max_size=8)


@given(rows, st.integers(1, 9))
def test_truncate_and_pad(samples: list[list[int]], length: int) -> None:
    tensors = [torch.tensor(sample, dtype=torch.int64) for sample in samples]
    cut = apply({"name": "truncate", "length": length}, tensors)
    assert [sample.tolist() for sample in cut] == [sample[:length] for sample in samples]
    padded = apply({"name": "pad", "length": length, "value": -1}, tensors)
    assert [p.tolist() for p in padded] == [s + [-1] * (length - len(s)) for s in samples]


@given(rows, st.integers(1, 9), st.booleans(), st.booleans())
def test_pack(samples: list[list[int]], length: int, separated: bool, padded: bool) -> None:
    options: dict[str, Any] = {"separator": 100} if separated else {}
    if padded:
        options["pad_value"] = -1
    arrays = [np.array(sample, dtype=np.int64) for sample in samples]
    packed = apply({"name": "pack", "length": length, **options}, arrays)
    stream = [token for sample in samples for token in (*sample, *([100] if separated else []))]
    if padded:
        stream += [-1] * (-len(stream) % length)
    assert [row.tolist() for row in packed] == [
        stream[i : i + length] for i in range(0, len(stream) - length + 1, length)
    ]


def test_normalise() -> None:
    for name in ("normalise", "normalize"):
        (own,) = apply(name, [[1.0, 3.0]])
        assert own.tolist() == [-1.0, 1.0]
        (given_ones,) = apply({"name": name, "mean": 1, "std": 4}, [np.array([1, 3], dtype=np.uint8)])
        assert given_ones.tolist() == [0.0, 0.5]
        assert given_ones.dtype == np.float32
    assert apply("normalise", [[2, 2]])[0].tolist() == [0.0, 0.0]
    assert apply("normalise", [np.empty(0)])[0].tolist() == []


def test_functions_take_any_sample() -> None:
    assert apply(str.upper, ["a", "b"]) == ["A", "B"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("trunkate", "did you mean 'truncate'"),
        ("truncate", "needs the option 'length'"),
        ({"name": "truncate", "lenght": 3}, "did you mean 'length'"),
        ({"name": "truncate", "length": 0}, "at least 1, got 0"),
        ({"name": "pack", "length": "3"}, "got '3'"),
        ({"length": 3}, "a table with a 'name'"),
        ({"name": "normalise", "std": 0}, "std must be above 0"),
    ],
)
def test_wrong_entries_are_named(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_transforms([entry])


def test_wrong_samples_are_named() -> None:
    with pytest.raises(ValueError, match="sequences of numbers, got str"):
        apply({"name": "truncate", "length": 1}, ["text"])
    with pytest.raises(ValueError, match="sequences of numbers, got int"):
        apply({"name": "truncate", "length": 1}, [3])
    with pytest.raises(ValueError, match="pad: the value -1 cannot be stored in samples of uint16"):
        apply({"name": "pad", "length": 3, "value": -1}, [np.array([1], dtype=np.uint16)])
    with pytest.raises(ValueError, match=r"one dimension, got the shape \(1, 2\)"):
        apply({"name": "pack", "length": 3}, [[[1, 2]]])
