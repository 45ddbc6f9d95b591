import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.runtime.metrics_log import MetricsLog, read_metrics


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 0, "loss": 2.5})
        assert read_metrics(path).records == [{"step": 0, "loss": 2.5}]
        log.write({"step": 1, "loss": 2.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "loss": 2.5},
        {"step": 1, "loss": 2.25},
    ]


def test_values_become_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(
            {
                "step": 0,
                "a": np.float32(0.5),
                "b": torch.tensor(3),
                "c": {"d": [np.int64(1), None, True]},
                "e": math.nan,
                "f": -math.inf,
            }
        )
    record = {"step": 0, "a": 0.5, "b": 3, "c": {"d": [1, None, True]}, "e": "nan", "f": "-inf"}
    assert read_metrics(path).records == [record]


@pytest.mark.parametrize("record", [{"loss": 1.0}, {"step": 1.0}, {"step": True}])
def test_a_record_needs_its_step(tmp_path: Path, record: dict[str, object]) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match="integer 'step'"):
        log.write(record)
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_what_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match=r"a\.0 holds a object"):
        log.write({"step": 1, "a": [object()]})


@given(written=st.integers(0, 12), cut=st.integers(0, 200), resume=st.integers(0, 15), more=st.integers(0, 4))
def test_after_kill_and_resume_each_step_stands_once(
    tmp_path_factory: pytest.TempPathFactory, written: int, cut: int, resume: int, more: int
) -> None:
    """A run writes steps 0..written-1, loses the last ``cut`` bytes, and is resumed."""
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(written):
            log.write({"step": step, "loss": 1 / (step + 1)})
    data = path.read_bytes()
    data = data[: max(0, len(data) - cut)]
    path.write_bytes(data)
    whole = data.count(b"\n")
    found = read_metrics(path)
    assert [record["step"] for record in found.records] == list(range(whole))
    assert (found.torn is None) == (data == b"" or data.endswith(b"\n"))
    with MetricsLog(path, resume_step=resume) as log:
        for step in range(resume, resume + more):
            log.write({"step": step})
    steps = [record["step"] for record in read_metrics(path).records]
    assert steps == [*range(min(whole, resume)), *range(resume, resume + more)]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not valid JSON"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not valid JSON"):
        MetricsLog(path, resume_step=3)
    with pytest.raises(ValueError, match="there is no such metrics file"):
        read_metrics(tmp_path / "other.jsonl")
