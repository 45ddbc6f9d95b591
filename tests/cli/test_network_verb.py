"""``penstock network`` on two processes of this machine, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from penstock.cli.main import app


def test_two_processes_are_measured_and_every_algorithm_predicted(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(300, 100), "b": torch.zeros(8)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-m", "penstock", "network", "--checkpoint", str(tmp_path / "model.safetensors")]
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, "--step-time", "5", "--json"], capture_output=True, text=True, timeout=110, check=True, env=env
    )
    result = json.loads(done.stdout)
    assert result["network"]["ranks"] == 2
    predictions = {(p["algorithm"], p["period"]): p for p in result["predictions"]}
    none = predictions["none", 1]
    assert none["bytes"] == 4 * 30_008
    assert none["relative_error"] == 0
    assert predictions["none", 30]["bytes"] == pytest.approx(4 * 30_008 / 30)
    assert 0.59 < predictions["onebit", 1]["relative_error"] < 0.62  # sqrt(1 - 2 / pi) of a normal distribution
    # 120 kB beside five seconds of compute: nothing needs to be left out.
    assert result["recommended"] == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --parameters NUMBER or --checkpoint"),
        (["--parameters", "0"], "at least one parameter, got 0"),
        (["--parameters", "9", "--step-time", "0"], "step time must be positive, got 0 s"),
        (["--parameters", "9", "--processes", "1"], "at least 2 ranks, got 1"),
        (["--parameters", "9", "--backend", "mpi"], "unknown backend 'mpi'; known: gloo, nccl"),
        (["--parameters", "9", "--deadline", "0"], "deadline must be positive"),
        (["--checkpoint", "no-such.safetensors"], "no-such.safetensors"),
    ],
)
def test_mistakes_are_refused_before_anything_is_launched(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["network", *arguments])
    assert result.exit_code == 2
    assert message in result.output
