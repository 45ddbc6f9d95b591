"""DeepSpeed's analyzer files: their layout as its own builder makes it, and the way back."""

import struct
from collections import defaultdict
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock._core.files import CorruptFileError
from penstock.data_pipeline.data_sampling import Analysis, DataAnalyzer, read_deepspeed, write_deepspeed
from penstock.data_pipeline.data_sampling.analysis import store_analysis
from penstock.data_pipeline.datasets import IndexedDataset


def peer_index(code: int, width: int, lengths: list[int], boundaries: list[int]) -> bytes:
    """The index of a file, byte by byte."""
    starts = [width * sum(lengths[:n]) for n in range(len(lengths))]
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(boundaries))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *starts)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )


def test_the_bytes_of_a_small_analysis(tmp_path: Path) -> None:
    analysis = store_analysis(tmp_path / "a", {"seqlen": [700, 5, 700, 6, 5]}, num_tokens=1416)
    write_deepspeed(analysis, tmp_path / "ds")
    place = tmp_path / "ds" / "seqlen"
    expected = {
        "seqlen_sample_to_metric": (6, "<5H", [700, 5, 700, 6, 5], [1] * 5, [0, 5, 5]),
        "seqlen_index_to_metric": (6, "<3H", [5, 6, 700], [1] * 3, [0, 3, 3]),
        "seqlen_index_to_sample": (1, "<5B", [1, 4, 3, 0, 2], [2, 1, 2], [0, 3, 3]),
        "seqlen_index_to_sample_percentile_merged": (1, "<5B", [1, 4, 3, 0, 2], [2, 1, 2], [0, 3]),
    }
    assert sorted(path.name for path in place.iterdir()) == sorted(
        f"{n}{s}" for n in expected for s in (".bin", ".idx")
    )
    for name, (code, form, numbers, lengths, boundaries) in expected.items():
        assert (place / f"{name}.bin").read_bytes() == struct.pack(form, *numbers)
        width = struct.calcsize(form[0] + form[-1])
        assert (place / f"{name}.idx").read_bytes() == peer_index(code, width, lengths, boundaries)


def test_totals_are_metrics_that_accumulate(tmp_path: Path) -> None:
    totals = {"counts": np.array([[3, 0], [700, 1]]), "share": np.array(0.25)}
    analysis = store_analysis(tmp_path / "a", {"m": [1, 2]}, totals=totals)
    with pytest.raises(ValueError, match="'share' has floats"):
        write_deepspeed(analysis, tmp_path / "ds")
    write_deepspeed(analysis, tmp_path / "ds", scale={"share": 1000})
    place = tmp_path / "ds" / "counts"
    assert (place / "counts_metric_value.bin").read_bytes() == struct.pack("<4H", 3, 0, 700, 1)
    assert (place / "counts_metric_value.idx").read_bytes() == peer_index(6, 2, [4], [0, 1])
    back = read_deepspeed(tmp_path / "ds", tmp_path / "b")
    assert (back.metrics, back.totals) == (("m",), ("counts", "share"))
    assert back.total("counts").tolist() == [3, 0, 700, 1]
    assert back.total("share").tolist() == [250]
    assert read_deepspeed(tmp_path / "ds", tmp_path / "c", ["m"]).totals == ()
    with pytest.raises(ValueError, match="no metric of DeepSpeed's analyzer"):
        read_deepspeed(tmp_path / "ds", tmp_path / "d", ["counts"])


@given(st.lists(st.integers(-1, 400), min_size=1, max_size=400))
@settings(max_examples=15)  # each example syncs twenty files
def test_there_and_back(tmp_path_factory: pytest.TempPathFactory, values: list[int]) -> None:
    place = tmp_path_factory.mktemp("ds")
    write_deepspeed(store_analysis(place / "a", {"m": values}), place / "ds")
    back = read_deepspeed(place / "ds", place / "b")
    assert back.values("m").tolist() == values
    assert Analysis.load(place / "b").num_tokens is None
    rows = defaultdict(list)
    for sample, value in enumerate(values):
        rows[value].append(sample)
    listed = [rows[value] for value in sorted(rows)]
    step = max(1, len(listed) // 100)
    merged = IndexedDataset(place / "ds" / "m" / "m_index_to_sample_percentile_merged", dtype_codes="deepspeed")
    assert [row.tolist() for row in merged] == [[*chain(*listed[i : i + step])] for i in range(0, len(listed), step)]


def test_floats_need_a_scale(tmp_path: Path) -> None:
    analysis = DataAnalyzer([[1, 2, 2], [3], []], output_dir=tmp_path / "a").run()
    with pytest.raises(ValueError, match=r"scale=\{'vocabularyrarity': 1000\}"):
        write_deepspeed(analysis, tmp_path / "ds")
    write_deepspeed(analysis, tmp_path / "ds", scale={"vocabularyrarity": 1000})
    back = read_deepspeed(tmp_path / "ds", tmp_path / "b")
    assert back.metrics == ("seqlen", "vocabularyrarity")
    assert back.num_tokens == 4
    assert back.values("vocabularyrarity").tolist() == np.rint(analysis.values("vocabularyrarity") * 1000).tolist()
    assert back.fingerprint is None
    back.check_dataset([[], [], []])  # whose tokens these are is not known


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metric of DeepSpeed's analyzer"):
        read_deepspeed(tmp_path, tmp_path / "b")
    with pytest.raises(ValueError, match="cannot be empty"):
        write_deepspeed(store_analysis(tmp_path / "e", {"m": []}), tmp_path / "ds")
    write_deepspeed(store_analysis(tmp_path / "a", {"m": [4, 4, 7]}), tmp_path / "ds")
    samples = tmp_path / "ds" / "m" / "m_index_to_sample.bin"
    for numbers, message in ((b"\0\1\1", "sample 2 is not listed"), (b"\0\1\3", "their numbers run to 3")):
        samples.write_bytes(numbers)
        with pytest.raises(CorruptFileError, match=message):
            read_deepspeed(tmp_path / "ds", tmp_path / "b")
    for values in ({}, {"m": [1], "n": [1, 2]}, {"m": [np.nan]}, {"m": ["x"]}):
        with pytest.raises(ValueError, match=r"one number per sample|finite numbers"):
            store_analysis(tmp_path / "c", values)
