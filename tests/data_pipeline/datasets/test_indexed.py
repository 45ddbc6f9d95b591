import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock._core.files import CorruptFileError
from penstock.data_pipeline.datasets.indexed import HEADER, IndexedDataset, bin_path, idx_path
from penstock.data_pipeline.datasets.indexed_builder import IndexedDatasetBuilder
from penstock.data_pipeline.datasets.indexed_dtypes import CODES, DtypeCodes

# Three sequences [1, 2, 3], [], [4, 5] of uint16 in two documents, written out by hand from the format's description.
GOLDEN_BIN = struct.pack("<5H", 1, 2, 3, 4, 5)
GOLDEN_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)
    + struct.pack("<B", 8)
    + struct.pack("<QQ", 3, 3)
    + struct.pack("<3i", 3, 0, 2)
    + struct.pack("<3q", 0, 6, 6)
    + struct.pack("<3q", 0, 2, 3)
)


def write_pair(prefix: Path, idx: bytes, data: bytes) -> Path:
    idx_path(prefix).write_bytes(idx)
    bin_path(prefix).write_bytes(data)
    return prefix


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "golden", GOLDEN_IDX, GOLDEN_BIN)


def test_builder_writes_the_golden_bytes(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "built", np.uint16) as builder:
        builder.add_item([1, 2, 3])
        builder.add_item([])
        builder.end_document()
        builder.add_item(torch.tensor([4, 5]))
        builder.end_document()
    assert (tmp_path / "built.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "built.idx").read_bytes() == GOLDEN_IDX


def test_reads_the_golden_bytes(golden: Path) -> None:
    for dataset in (
        IndexedDataset(golden),
        IndexedDataset(f"{golden}.idx", mmap=False),
        IndexedDataset(f"{golden}.bin", check_entries=False),
    ):
        assert [sequence.tolist() for sequence in dataset] == [[1, 2, 3], [], [4, 5]]
        assert dataset.dtype == np.uint16
        assert dataset.lengths.tolist() == [3, 0, 2]
        assert dataset.document_indices.tolist() == [0, 2, 3]
        assert dataset.num_documents == 2
        assert dataset.num_tokens == 5
        assert dataset.tokens.tolist() == [1, 2, 3, 4, 5]
        assert dataset.is_contiguous
        assert dataset.modes is None
        assert dataset[-1].tolist() == [4, 5]
        assert [part.tolist() for part in dataset[::2]] == [[1, 2, 3], [4, 5]]
        assert dataset.get(0, 1).tolist() == [2, 3]
        assert dataset.get(0, 1, 1).tolist() == [2]
        tokens, offsets = dataset.read_range(1, 3)
        assert tokens.tolist() == [4, 5]
        assert offsets.tolist() == [0, 0, 2]


def test_modes_follow_the_documents(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "m", np.uint16, multimodal=True) as builder:
        builder.add_document([1, 2, 3], lengths=[3, 0], modes=[0, 1])
        builder.add_item([4, 5], mode=-7)
    assert (tmp_path / "m.idx").read_bytes() == GOLDEN_IDX + struct.pack("<3b", 0, 1, -7)
    modes = IndexedDataset(tmp_path / "m").modes
    assert modes is not None
    assert modes.tolist() == [0, 1, -7]


def test_items_are_the_callers_own_and_views_are_read_only(golden: Path) -> None:
    dataset = IndexedDataset(golden)
    item = dataset[0]
    item[:] = 9
    torch.from_numpy(dataset[0])  # a read-only array would warn, and warnings are errors here
    assert dataset[0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens[0] = 9


def test_a_pickled_dataset_carries_no_tokens(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d", np.int64) as builder:
        builder.add_item(np.arange(100_000))
    data = pickle.dumps(IndexedDataset(tmp_path / "d"))
    assert len(data) < 2000
    assert pickle.loads(data)[0].sum() == 100_000 * 99_999 // 2


def test_empty_dataset(tmp_path: Path) -> None:
    IndexedDatasetBuilder(tmp_path / "empty").finalize()
    dataset = IndexedDataset(tmp_path / "empty")
    assert len(dataset) == 0
    assert dataset.num_tokens == 0
    assert dataset.document_indices.tolist() == [0]
    with pytest.raises(IndexError, match="has 0"):
        dataset[0]


documents = st.lists(st.lists(st.lists(st.integers(0, 127), max_size=9), min_size=1, max_size=4), max_size=6)


@given(documents, st.sampled_from(sorted(CODES)), st.integers(1, 8))
def test_what_is_built_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, docs: list[list[list[int]]], codes: DtypeCodes, code: int
) -> None:
    prefix = tmp_path_factory.mktemp("round") / "d"
    dtype = CODES[codes][code]
    with IndexedDatasetBuilder(prefix, dtype, dtype_codes=codes) as builder:
        for number, doc in enumerate(docs):
            if number % 3 == 0:
                builder.add_items(doc)
                builder.end_document()
            elif number % 3 == 1:
                builder.add_document([t for seq in doc for t in seq], lengths=[len(seq) for seq in doc])
            else:
                for seq in doc:
                    builder.add_item(seq)
                builder.end_document()
    assert idx_path(prefix).read_bytes()[17] == code
    dataset = IndexedDataset(prefix, dtype_codes=codes)
    flat = [seq for doc in docs for seq in doc]
    assert dataset.dtype == dtype
    assert [seq.tolist() for seq in dataset] == flat
    assert dataset.document_indices.tolist() == np.cumsum([0] + [len(doc) for doc in docs]).tolist()

    with IndexedDatasetBuilder(prefix.with_name("twice"), dtype, dtype_codes=codes) as builder:
        builder.add_index(dataset)
        builder.add_items(flat, documents=True)
    twice = IndexedDataset(prefix.with_name("twice"), dtype_codes=codes)
    assert [seq.tolist() for seq in twice] == flat + flat
    starts = np.cumsum([0] + [len(doc) for doc in docs]).tolist()
    assert twice.document_indices.tolist() == starts + [len(flat) + i + 1 for i in range(len(flat))]


@given(
    st.lists(st.tuples(st.integers(0, len(GOLDEN_IDX) - 1), st.integers(0, 255)), max_size=3),
    st.integers(0, len(GOLDEN_IDX) + 4),
    st.integers(0, len(GOLDEN_BIN) + 3),
)
def test_damaged_files_are_refused_or_consistent(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], idx_size: int, bin_size: int
) -> None:
    damaged = bytearray(GOLDEN_IDX)
    for at, value in edits:
        damaged[at] = value
    idx = bytes(damaged).ljust(idx_size, b"\x01")[: max(idx_size, 1)] if idx_size % 2 else bytes(damaged)
    prefix = write_pair(tmp_path_factory.mktemp("fuzz") / "d", idx, GOLDEN_BIN.ljust(bin_size, b"\x07")[:bin_size])
    try:
        dataset = IndexedDataset(prefix)
    except CorruptFileError:
        # The lazy reader may open it, but what it then hands out lies inside the file.
        try:
            lazy = IndexedDataset(prefix, check_entries=False)
            for index in range(len(lazy)):
                assert len(lazy[index]) == lazy.lengths[index]
        except CorruptFileError:
            pass
    else:
        for index, sequence in enumerate(dataset):
            assert len(sequence) == dataset.lengths[index]
        tokens, offsets = dataset.read_range(0, len(dataset))
        assert [part.tolist() for part in np.split(tokens, offsets[1:-1])] == [s.tolist() for s in dataset]
        assert (np.diff(dataset.document_indices) >= 0).all()


def edited(at: int, packed: bytes) -> bytes:
    return GOLDEN_IDX[:at] + packed + GOLDEN_IDX[at + len(packed) :]


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (b"", "0 bytes, but the header alone has 34"),
        (GOLDEN_IDX[:33], "33 bytes, but the header"),
        (edited(0, b"X"), "not an indexed dataset"),
        (edited(9, struct.pack("<Q", 2)), "format version 2"),
        (edited(17, b"\x09"), r"unknown dtype code 9; known: 1 \(uint8\)"),
        (edited(18, struct.pack("<Q", 1 << 63)), "cut short"),
        (GOLDEN_IDX[:-1], "93 bytes, but 3 sequences and 3 document boundaries take 94"),
        (HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 0, 0), "no document boundaries"),
        (edited(34, struct.pack("<i", -1)), "sequence 0 claims -1 tokens"),
        (edited(34, struct.pack("<i", 6)), "sequence 0 claims 6 tokens of 2 bytes at byte 0"),
        (edited(46 + 16, struct.pack("<q", 8)), "sequence 2 claims 2 tokens of 2 bytes at byte 8"),
        (edited(46 + 16, struct.pack("<q", 5)), "at byte 5"),
        (edited(46 + 16, struct.pack("<q", (1 << 63) - 1)), "sequence 2"),
        (edited(46, struct.pack("<q", -2)), "at byte -2"),
        (edited(70, struct.pack("<q", 1)), "run from 1 to 3"),
        (edited(70 + 16, struct.pack("<q", 2)), "from 0 to 2, but must run from 0 to the number of sequences, 3"),
        (edited(70 + 8, struct.pack("<q", 4)), r"boundary 2 \(3\) lies before boundary 1 \(4\)"),
    ],
)
def test_each_damage_is_named(tmp_path: Path, idx: bytes, message: str) -> None:
    prefix = write_pair(tmp_path / "d", idx, GOLDEN_BIN)
    with pytest.raises(CorruptFileError, match=message) as caught:
        IndexedDataset(prefix)
    assert str(idx_path(prefix)) in str(caught.value)


def test_lazy_reading_refuses_a_lying_entry(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "d", edited(34, struct.pack("<i", 1 << 30)), GOLDEN_BIN)
    dataset = IndexedDataset(prefix, check_entries=False)
    with pytest.raises(CorruptFileError, match="sequence 0 claims 1073741824"):
        dataset[0]
    with pytest.raises(CorruptFileError, match="sequence 0 claims 1073741824"):
        dataset.read_range(0, 3)


def test_sequences_may_lie_in_any_order(tmp_path: Path) -> None:
    idx = edited(46, struct.pack("<3q", 4, 0, 0))
    dataset = IndexedDataset(write_pair(tmp_path / "d", idx, GOLDEN_BIN))
    assert not dataset.is_contiguous
    assert [sequence.tolist() for sequence in dataset] == [[3, 4, 5], [], [1, 2]]
    assert dataset.read_range(0, 3)[0].tolist() == [3, 4, 5, 1, 2]
    with IndexedDatasetBuilder(tmp_path / "copy", np.uint16) as builder:
        builder.add_index(tmp_path / "d")
    assert [sequence.tolist() for sequence in IndexedDataset(tmp_path / "copy")] == [[3, 4, 5], [], [1, 2]]


def test_missing_files_are_named(tmp_path: Path, golden: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"nowhere\.idx: the file is missing"):
        IndexedDataset(tmp_path / "nowhere")
    bin_path(golden).unlink()
    with pytest.raises(CorruptFileError, match=r"golden\.bin: the file is missing"):
        IndexedDataset(golden)


def test_reads_outside_are_refused(golden: Path) -> None:
    dataset = IndexedDataset(golden)
    with pytest.raises(IndexError, match="sequence 3"):
        dataset[3]
    with pytest.raises(IndexError, match="sequence -4"):
        dataset[-4]
    with pytest.raises(ValueError, match="tokens 2 to 4 of sequence 0, which has 3"):
        dataset.get(0, 2, 2)
    with pytest.raises(ValueError, match="tokens -1"):
        dataset.get(0, -1)
    with pytest.raises(IndexError, match="sequences 1 to 4"):
        dataset.read_range(1, 4)


@pytest.mark.parametrize(("dtype", "code"), [("uint16", 6), ("uint32", 7), ("uint64", 8)])
def test_a_file_by_deepspeed_is_read_when_told(tmp_path: Path, dtype: str, code: int) -> None:
    prefix = write_pair(
        tmp_path / "d",
        GOLDEN_IDX[:17]
        + struct.pack("<BQQ", code, 3, 3)
        + struct.pack("<3i", 3, 0, 2)
        + struct.pack("<3q", *(np.array([0, 3, 3]) * np.dtype(dtype).itemsize))
        + struct.pack("<3q", 0, 2, 3),
        np.arange(1, 6, dtype=dtype).tobytes(),
    )
    with pytest.raises(ValueError, match=rf"dtype_codes='deepspeed' \({dtype}\)"):
        IndexedDataset(prefix)
    dataset = IndexedDataset(prefix, dtype_codes="deepspeed")
    assert [row.tolist() for row in dataset] == [[1, 2, 3], [], [4, 5]]
    assert pickle.loads(pickle.dumps(dataset)).dtype == dtype


def test_floats_are_no_small_numbers(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "f", np.float32) as builder:
        builder.add_item([0.0, 1e-20, 3.5])
    assert IndexedDataset(tmp_path / "f")[0].tolist() == pytest.approx([0.0, 1e-20, 3.5])
    with pytest.raises(ValueError, match=r"cannot hold uint64; it holds .*; dtype_codes='deepspeed' would hold it"):
        IndexedDatasetBuilder(tmp_path / "g", np.uint64)
    with pytest.raises(ValueError, match="did you mean 'megatron'"):
        IndexedDataset(tmp_path / "f", dtype_codes="megatorn")  # type: ignore[arg-type]
