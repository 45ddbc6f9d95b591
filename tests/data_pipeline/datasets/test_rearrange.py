from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data_pipeline.datasets import IndexedDataset, IndexedDatasetBuilder, merge_indexed, split_indexed
from penstock.data_pipeline.datasets.rearrange import check_tokens

documents = st.lists(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=3), max_size=8)


def write(prefix: Path, docs: list[list[list[int]]]) -> IndexedDataset:
    with IndexedDatasetBuilder(prefix, np.uint16, multimodal=True) as builder:
        for doc in docs:
            for number, sequence in enumerate(doc):
                builder.add_item(sequence, mode=number)
            builder.end_document()
    return IndexedDataset(prefix)


def read(dataset: IndexedDataset) -> list[list[list[int]]]:
    bounds = dataset.document_indices.tolist()
    return [[dataset[i].tolist() for i in range(a, b)] for a, b in pairwise(bounds)]


@given(documents, st.lists(st.floats(0.1, 5), min_size=1, max_size=4))
@settings(max_examples=25)  # each example syncs ten files
def test_what_is_split_is_merged_again(
    tmp_path_factory: pytest.TempPathFactory, docs: list[list[list[int]]], shares: list[float]
) -> None:
    place = tmp_path_factory.mktemp("split")
    whole = write(place / "whole", docs)
    names = [place / f"part{number}" for number in range(len(shares))]
    parts = split_indexed(whole, names, shares)
    assert [doc for part in parts for doc in read(part)] == docs
    for done, part in enumerate(parts[:-1], start=1):
        aim = whole.num_tokens * sum(shares[:done]) / sum(shares)
        reached = sum(p.num_tokens for p in parts[:done])
        bounds = np.cumsum([0, *(sum(map(len, doc)) for doc in docs)])
        assert abs(reached - aim) <= np.abs(bounds - aim).min() + 1e-6, part
    merge_indexed(names, place / "again")
    for suffix in (".bin", ".idx"):
        assert Path(f"{place}/again{suffix}").read_bytes() == Path(f"{place}/whole{suffix}").read_bytes()


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2]]])
    with pytest.raises(ValueError, match=r"a\.bin, .*a\.idx: there already"):
        merge_indexed([tmp_path / "a"], tmp_path / "a")
    assert merge_indexed([tmp_path / "a", tmp_path / "a"], tmp_path / "a", overwrite=True).num_tokens == 4
    assert IndexedDataset(tmp_path / "a").num_documents == 2
    for outputs, shares, message in (
        (["x", "y"], [1], "2 parts need as many positive shares"),
        (["x", "y"], [1, -1], "positive shares"),
        (["x", "x.bin"], None, "different paths"),
    ):
        with pytest.raises(ValueError, match=message):
            split_indexed(tmp_path / "a", outputs, shares)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_indexed([], tmp_path / "b")
    with IndexedDatasetBuilder(tmp_path / "wide", np.int32) as builder:
        builder.add_item([1])
    with pytest.raises(ValueError, match="holds int32, this dataset uint16"):
        merge_indexed([tmp_path / "a", tmp_path / "wide"], tmp_path / "b")
    assert not (tmp_path / "b.bin").exists()


def test_every_byte_is_accounted_for(tmp_path: Path) -> None:
    whole = write(tmp_path / "a", [[[7, 3], []], [[9]]])
    checked = check_tokens(whole)
    assert (checked.smallest, checked.largest, checked.empty, checked.problems) == (3, 9, 1, [])
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(b"\0\0")
    assert (
        "8 bytes, but the sequences take 6: some bytes belong to no sequence"
        in check_tokens(IndexedDataset(tmp_path / "a")).problems[0]
    )
    for dtype, values, message in (
        (np.int32, [5, -1], "smallest token is -1"),
        (np.float32, [1, np.nan], "token 1 is"),
    ):
        with IndexedDatasetBuilder(tmp_path / "b", dtype) as builder:
            builder.add_item(np.array(values, dtype=dtype))
        assert message in check_tokens(IndexedDataset(tmp_path / "b")).problems[0]
