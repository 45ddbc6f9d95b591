"""Windows over the stream, against slices written out by hand."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from penstock.data_pipeline.datasets import IndexedDataset, IndexedDatasetBuilder, TokenWindows


def _corpus(prefix: Path, lengths: list[int], dtype: type = np.uint16) -> tuple[IndexedDataset, list[int]]:
    stream = list(range(sum(lengths)))
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        start = 0
        for length in lengths:
            builder.add_document(stream[start : start + length])
            start += length
    return IndexedDataset(prefix), stream


@given(total=st.integers(2, 60), length=st.integers(1, 20), stride=st.none() | st.integers(1, 25))
def test_every_window_is_that_slice_of_the_stream(total: int, length: int, stride: int | None) -> None:
    stream = np.arange(total, dtype=np.uint16)
    step = length if stride is None else stride
    expected = [list(range(s, s + length + 1)) for s in range(0, total, step) if s + length + 1 <= total]
    if not expected:
        with pytest.raises(ValueError, match=f"{total} tokens"):
            TokenWindows(stream, length, stride)
        return
    windows = TokenWindows(stream, length, stride)
    assert [window.tolist() for window in windows] == expected
    assert windows.batch(range(len(windows))).tolist() == expected
    assert windows.dropped_tokens == total - (expected[-1][-1] + 1)


def test_windows_run_across_documents_and_know_them(tmp_path: Path) -> None:
    lengths = [3, 1, 0, 5, 4]
    indexed, stream = _corpus(tmp_path / "c", lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths).tolist()
    windows = TokenWindows(indexed, 4)
    assert windows[1].tolist() == stream[4:9]
    assert windows[-1].tolist() == windows[len(windows) - 1].tolist() == stream[8:13]
    assert windows.document_ids(1).tolist() == owner[4:9]
    assert windows.document_ids([[0], [2]]).tolist() == [[owner[0:5]], [owner[8:13]]]
    assert windows.document_ids([-1, -3]).tolist() == [owner[8:13], owner[0:5]]
    for beyond in (3, -4, [0, 3]):
        with pytest.raises(IndexError, match=r"window (3|-4) of 3"):
            windows.document_ids(beyond)
    assert windows.batch([2, 0]).dtype == np.uint16


def test_a_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "c", np.int32) as builder:
        builder.add_document(np.arange(6), lengths=[2, 4])
        builder.add_document(np.arange(3))
    windows = TokenWindows(IndexedDataset(tmp_path / "c"), 8)
    assert windows.document_ids(0).tolist() == [0] * 6 + [1] * 3


def test_nothing_is_copied_and_a_window_cannot_be_written_to(tmp_path: Path) -> None:
    indexed, _ = _corpus(tmp_path / "c", [20])
    windows = TokenWindows(indexed, 4)
    assert np.shares_memory(windows[0], windows[1])  # neighbours share one token of the stream
    with pytest.raises(ValueError, match="read-only"):
        windows[0][0] = 1
    batch = windows.batch([0, 1])
    batch[:] = 0
    assert windows[0].tolist() == [0, 1, 2, 3, 4]


def test_a_pickled_copy_carries_no_tokens(tmp_path: Path) -> None:
    indexed, _ = _corpus(tmp_path / "c", [5000])
    data = pickle.dumps(TokenWindows(indexed, 4, 2))
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert (copy.length, copy.stride) == (4, 2)
    assert copy[3].tolist() == [6, 7, 8, 9, 10]


def test_mistakes_are_refused(tmp_path: Path) -> None:
    stream = np.arange(10)
    for length, stride in [(0, None), (3, 0), (-1, None)]:
        with pytest.raises(ValueError, match="at least 1"):
            TokenWindows(stream, length, stride)
    with pytest.raises(ValueError, match="10 tokens, fewer than one window of 10"):
        TokenWindows(stream, 10)
    with pytest.raises(ValueError, match="integer tokens"):
        TokenWindows(np.arange(10.0), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="integer tokens"):
        TokenWindows(np.zeros((2, 5), dtype=np.int64), 2)
    with pytest.raises(ValueError, match="got list"):
        TokenWindows([1, 2, 3], 2)  # type: ignore[arg-type]
    windows = TokenWindows(stream, 3)
    with pytest.raises(IndexError, match="window 3 of 3"):
        windows[3]
    with pytest.raises(ValueError, match="know no documents"):
        windows.document_ids([0])


def test_a_batch_sampler_given_as_a_sampler_is_told() -> None:
    windows = TokenWindows(np.arange(40), 4)
    loader = DataLoader(windows, sampler=[[0, 1], [2, 3]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"one whole number, got list; .* is a DataLoader's batch_sampler="):
        next(iter(loader))
    loader = DataLoader(windows, batch_size=2, sampler=[[0, 1], [2, 3]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batch_sampler="):
        next(iter(loader))
