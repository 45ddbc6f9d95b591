from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.datasets import TokenCollator

_rows = st.lists(st.lists(st.integers(0, 60_000), min_size=2, max_size=12), min_size=1, max_size=6)


@given(_rows, st.sampled_from([1, 4, 8]), st.none() | st.integers(11, 20), st.sampled_from(["list", "array", "tensor"]))
def test_inputs_and_labels_are_the_row_shifted_and_padded(
    rows: list[list[int]], multiple_of: int, length: int | None, form: str
) -> None:
    make: Any = {"list": list, "array": lambda row: np.array(row, dtype=np.uint16), "tensor": torch.tensor}[form]
    inputs, labels = TokenCollator(pad_token=7, length=length, multiple_of=multiple_of)([make(row) for row in rows])
    width = (max(len(row) for row in rows) - 1) if length is None else length
    width += -width % multiple_of
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.is_contiguous()
    assert labels.is_contiguous()
    for row, got_inputs, got_labels in zip(rows, inputs.tolist(), labels.tolist(), strict=True):
        pad = width - (len(row) - 1)
        assert got_inputs == row[:-1] + [7] * pad
        assert got_labels == row[1:] + [-100] * pad


def test_a_batch_in_one_array_is_collated_whole_and_left_alone() -> None:
    tokens = np.arange(12, dtype=np.uint16).reshape(3, 4)
    inputs, labels = TokenCollator()(tokens)
    assert inputs.tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert labels.tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    wide = np.arange(12, dtype=np.int64).reshape(3, 4)
    inputs, _ = TokenCollator()(wide)
    inputs.zero_()
    assert wide[2].tolist() == [8, 9, 10, 11]
    wide.flags.writeable = False
    assert TokenCollator(length=5)(wide)[1].tolist()[0] == [1, 2, 3, -100, -100]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "without rows"),
        (np.empty((0, 5), dtype=np.int64), "without rows"),
        ([[1, 2], [3]], "row 1 of the batch holds 1 tokens"),
        ([[1.5, 2.0]], "row 0 of the batch is not a row of tokens"),
        ([np.zeros((2, 3), dtype=np.int64)], "is not a row of tokens"),
        ([[1, 2, 3, 4, 5]], r"4 \+ 1 tokens does not fit length=3"),
    ],
)
def test_mistakes_are_refused(rows: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TokenCollator(length=3)(rows)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TokenCollator(multiple_of=0)
    with pytest.raises(ValueError, match="at least 1"):
        TokenCollator(length=0)
