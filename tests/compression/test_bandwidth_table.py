"""The table of the bandwidth benchmark: from cells that an earlier run kept, and with what the predictor said."""

import importlib
from pathlib import Path
from typing import Any

import pytest

RATE, MACHINES = "100 Mbit/s", "2 machines"


@pytest.fixture(name="bandwidth")
def fixture_bandwidth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("benchmarks.compression.bandwidth")


def kept() -> dict[str, dict[str, Any]]:
    """Cells as every version of the benchmark has kept them; one contender failed."""
    steps = {"DDP": 8.0, "penstock onebit": 0.5, "DiLoCo float32": 0.4, "torch fp16 hook": 4.0}
    cells: dict[str, dict[str, Any]] = {
        f"{RATE}, {MACHINES}, {name}, round {number}": {
            "step_s": step + 0.01 * number,
            "cpu_s": 0.2,
            "bytes": 1e8 / (8.0 / step),
            "seconds": [step] * 3,
        }
        for name, step in steps.items()
        for number in range(3)
    }
    return cells | {f"{RATE}, {MACHINES}, torch PowerSGD, round 0": {"error": "no end"}}


def rows(table: str) -> dict[str, list[str]]:
    lines = [[entry.strip() for entry in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line[1:] for line in lines}


def test_cells_of_earlier_runs_make_the_table_without_predictions(bandwidth: Any) -> None:
    table = rows(bandwidth.report(kept()))
    assert table["DDP"][:3] == ["8.010 (8.00-8.02)", "", "1.00x"]
    assert table["penstock onebit"][2] == "15.71x"  # 8.01 / 0.51
    assert table["torch PowerSGD"][0] == "fails"


def test_predictions_are_those_of_the_cost_model(bandwidth: Any) -> None:
    prediction = importlib.import_module("benchmarks.compression.bandwidth_prediction")
    link = {"latency_s": 0.001, "seconds_per_byte": 8e-8}
    rank: dict[str, Any] = {
        "median": 0.12,
        "network": {"ranks": 2, "all_reduce": link, "all_to_all": link, "all_gather": link},
        "codecs": {
            name: {"compress_s": 2e-9, "decompress_s": 1e-9, "relative_error": 0.5} for name in ("none", "onebit")
        },
    }
    cell = prediction.cell_of([rank, {**rank, "median": 0.1}])
    table = rows(bandwidth.report(kept() | {f"{RATE}, {MACHINES}, network, round 0": cell}))
    numel = 16 * (1250 * 1250 + 1250)
    # Two ranks send the buffer once, in four buckets of 25 MiB; two thirds of the compute hide it.
    wire = 4 * 0.001 + 4 * numel * 8e-8
    codec = numel * 3e-9
    assert float(table["DDP"][1]) == pytest.approx(0.12 + codec + wire - 0.08, abs=1e-3)
    assert float(table["DiLoCo float32"][1]) == pytest.approx(0.12 + (codec + wire) / 30, abs=1e-3)
    # A bit an element and a scale for 1,024, half of it in each of two phases.
    wire = 2 * 4 * 0.001 + numel * (1 / 8 + 4 / 1024) * 8e-8
    codec = numel * (1.5 * 2e-9 + 2 * 1e-9)
    assert float(table["penstock onebit"][1]) == pytest.approx(0.12 + codec + wire - 0.08, abs=1e-3)
    assert table["torch fp16 hook"][1] == ""
