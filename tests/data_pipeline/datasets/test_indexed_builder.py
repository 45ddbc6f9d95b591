from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.indexed_builder import IndexedDatasetBuilder


def test_nothing_appears_before_finalize_and_nothing_after_abort(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(tmp_path / "d")
    builder.add_item([1])
    assert not (tmp_path / "d.bin").exists()
    builder.abort()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="finalized or abandoned"):
        builder.add_item([1])


def test_an_exception_leaves_the_former_dataset(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d") as builder:
        builder.add_item([1])

    def fail_midway() -> None:
        with IndexedDatasetBuilder(tmp_path / "d") as builder:
            builder.add_item([2, 3])
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert IndexedDataset(tmp_path / "d")[0].tolist() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_rebuilding_replaces_the_dataset(tmp_path: Path) -> None:
    for tokens in ([1], [2, 3]):
        with IndexedDatasetBuilder(tmp_path / "d") as builder:
            builder.add_item(tokens)
    assert IndexedDataset(tmp_path / "d")[0].tolist() == [2, 3]


def test_open_documents_are_ended_where_another_begins(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d") as builder:
        builder.add_item([1])
        builder.add_item([2])
        builder.add_document([3])
        builder.add_item([4])
        builder.add_items([[5], [6]], documents=True)
        builder.end_document()
    assert IndexedDataset(tmp_path / "d").document_indices.tolist() == [0, 2, 3, 4, 5, 6, 6]


@given(st.integers(-(1 << 40), 1 << 40), st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, np.int32]))
def test_tokens_that_do_not_fit_are_refused(
    tmp_path_factory: pytest.TempPathFactory, token: int, dtype: type[np.integer]
) -> None:
    builder = IndexedDatasetBuilder(tmp_path_factory.mktemp("fit") / "d", dtype)
    if np.iinfo(dtype).min <= token <= np.iinfo(dtype).max:
        builder.add_item([token])
    else:
        with pytest.raises(ValueError, match=f"tokens run from {token} to {token}, but {np.dtype(dtype).name} holds"):
            builder.add_item([token])
    builder.abort()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold uint32; it holds uint8"):
        IndexedDatasetBuilder(tmp_path / "d", np.uint32)
    with IndexedDatasetBuilder(tmp_path / "d", np.uint16) as builder:
        with pytest.raises(ValueError, match=r"one dimension of tokens, got the shape \(1, 2\)"):
            builder.add_item([[1, 2]])
        with pytest.raises(ValueError, match="tokens of float64 cannot be stored as uint16"):
            builder.add_item([1.5])
        with pytest.raises(ValueError, match="lengths add up to 3, but there are 2 tokens"):
            builder.add_document([1, 2], lengths=[3])
        with pytest.raises(ValueError, match="0 to 2147483647 tokens, got -1 to 3"):
            builder.add_document([1, 2], lengths=[3, -1])
        with pytest.raises(ValueError, match="multimodal=True"):
            builder.add_item([1], mode=1)
    assert len(IndexedDataset(tmp_path / "d")) == 0
    with IndexedDatasetBuilder(tmp_path / "m", np.int8, multimodal=True) as builder:
        with pytest.raises(ValueError, match="2 sequences need 2 modes"):
            builder.add_document([1, 2], lengths=[1, 1], modes=[1])
        builder.add_item([1], mode=1)
    for dtype, remedy in ((np.int8, "build this dataset with multimodal=True"), (np.int16, "one with dtype=int8")):
        builder = IndexedDatasetBuilder(tmp_path / "n", dtype)
        with pytest.raises(ValueError, match=remedy):
            builder.add_index(tmp_path / "m")
        builder.abort()
