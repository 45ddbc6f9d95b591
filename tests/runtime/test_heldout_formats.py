"""Held-out tokens may lie in whatever training data may lie in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from penstock.data_pipeline.datasets import IndexedDatasetBuilder
from penstock.runtime.config import load_config
from penstock.runtime.evaluation import heldout_windows
from penstock.runtime.main_job import train

ROWS = [np.random.default_rng(0).integers(0, 50, size=n).tolist() for n in (7, 1, 0, 20, 12)]


def config_of(heldout: Path, **data: object) -> dict[str, Any]:
    return {
        "model": {"vocab_size": 50, "num_layers": 1, "hidden_size": 8, "num_heads": 1, "context": 4},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 1},
        "data": {"train": "none", "heldout": str(heldout), **data},
    }


def write(path: Path, rows: list[list[int]]) -> None:
    table = pa.table({"id": list(range(len(rows))), "words": rows})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path, chunksize=2)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    elif path.suffix == ".npy":
        np.save(path, np.concatenate(rows).astype(np.int64))
    else:
        with IndexedDatasetBuilder(path, np.uint16) as builder:
            builder.add_items(rows, documents=True)


@pytest.mark.parametrize("name", ["h", "h.parquet", "h.feather", "h.jsonl", "h.npy"])
def test_the_tokens_are_one_stream(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    windows = heldout_windows(load_config(config_of(tmp_path / name, column="words")))
    stream = [token for row in ROWS for token in row]
    assert [window.tolist() for window in windows] == [stream[at : at + 5] for at in range(0, len(stream) - 4, 4)]


def test_what_is_no_held_out_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "words"}))
    with pytest.raises(ValueError, match=r"held-out data is tokens.*penstock tokenize"):
        heldout_windows(load_config(config_of(tmp_path / "text.jsonl")))
    write(tmp_path / "few.parquet", [[1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="1 held-out windows of 4 tokens do not fill one global batch of 4"):
        heldout_windows(load_config(config_of(tmp_path / "few.parquet", column="words")))


def test_a_token_beyond_the_vocabulary_is_found_before_the_run(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", ROWS)
    write(tmp_path / "h.parquet", [*ROWS, [50]])
    config = config_of(tmp_path / "h.parquet", train=str(tmp_path / "t.parquet"), column="words")
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"data.heldout: .*h.parquet holds the token 50, but the model's vocabulary is 50"
    ):
        train(tmp_path / "run.yaml", [], tmp_path / "out")
