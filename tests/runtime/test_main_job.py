"""``penstock train`` as a user runs it, in fresh processes, small."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from penstock.data_pipeline.data_sampling import IndexedDatasetBuilder
from penstock.runtime.metrics_log import read_metrics

pytestmark = pytest.mark.timeout(180)

STEPS = 8


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, *(launcher or ()), "-m", "penstock", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=170)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of a tiny run on two stages and two replicas, and its data."""
    folder = tmp_path_factory.mktemp("job")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("heldout", 12)):
        with IndexedDatasetBuilder(folder / name, np.uint16) as builder:
            builder.add_items([rng.integers(0, 50, size=33) for _ in range(count)], documents=True)
    config: dict[str, Any] = {
        "deadline_s": 30,
        "model": {"vocab_size": 50, "num_layers": 4, "hidden_size": 16, "num_heads": 2, "context": 16},
        "pipe": {"stages": 2},
        "data_parallel": {"replicas": 2},
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "steps": STEPS,
            "eval_every": 3,
            "checkpoint_every": 3,
            "log_every": 2,
        },
        "data": {"train": str(folder / "train"), "heldout": str(folder / "heldout")},
        "random_ltd": {"layers": "middle", "min_tokens": 8, "steps": 6, "seq_per_step": 2},
        "optimizer": {"name": "onebit_adam", "lr": 1e-3, "freeze_step": 3},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def whole(setting: Path) -> Path:
    """The directory of a run that was launched and went through."""
    output = setting / "whole"
    ended = run("train", str(setting / "run.yaml"), "--output", str(output))
    assert ended.returncode == 0, ended.stderr
    assert "held-out loss" in ended.stdout
    assert "sent, between replicas" in ended.stdout
    return output


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(output / "metrics.jsonl").records]


def test_a_run_leaves_metrics_checkpoints_and_a_summary(whole: Path) -> None:
    records = read_metrics(whole / "metrics.jsonl").records
    assert [record["step"] for record in records] == list(range(STEPS))
    assert [record["tokens"] for record in records] == [8 * 16 * (step + 1) for step in range(STEPS)]
    assert [record["kept_tokens"] for record in records] == [8, 8, 10, 12, 12, 14, 16, 16]
    assert sorted(step for step, record in enumerate(records) if "heldout_loss" in record) == [2, 5]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["raw_tokens"] == {"spent": STEPS * 128, "plain": STEPS * 128, "saved": 0.0}
    dropped = 2 * 8 * sum(16 - record["kept_tokens"] for record in records)
    assert summary["layer_tokens"]["plain"] - summary["layer_tokens"]["spent"] == dropped
    assert summary["heldout"]["tokens"] == 24 * 16  # 396 tokens give 24 windows: 3 global batches
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]


def test_eval_on_one_process_finds_the_same_loss(whole: Path) -> None:
    ended = run("eval", str(whole))
    assert ended.returncode == 0, ended.stderr
    (loss,) = re.findall(r"^nats per token +([0-9.]+)", ended.stdout, re.M)
    expected = json.loads((whole / "summary.json").read_text())["heldout"]["nats_per_token"]
    assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_resuming_is_bitwise(setting: Path, whole: Path) -> None:
    output = setting / "resumed"
    # The same run, stopped early by a lower number of steps would have another schedule: stop it by removing its end.
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoints" / "step_00000008")
    log = output / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:7]))  # one step was made that was not saved
    # Without a configuration the run's own is taken.
    ended = run("train", "--output", str(output), "--resume", "--set", "train.log_every=1")
    assert ended.returncode == 0, ended.stderr
    assert "resuming from" in ended.stdout
    assert "changed since then: train.log_every: 1, was 2" in ended.stdout
    assert not (output / "corpus").exists()
    steps = [record["step"] for record in read_metrics(output / "metrics.jsonl").records]
    assert steps == list(range(STEPS))
    assert losses(output) == losses(whole)


def test_torchrun_joins_the_given_processes(setting: Path, whole: Path) -> None:
    output = setting / "torchrun"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m")
    command = [sys.executable, *launcher, "penstock", "train", str(setting / "run.yaml"), "--output", str(output)]
    ended = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=170
    )
    assert ended.returncode == 0, ended.stderr
    assert losses(output) == losses(whole)
    again = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=170
    )
    assert again.returncode != 0
    assert "holds a run already" in again.stderr


def test_tokens_outside_the_vocabulary_are_refused_before_processes_start(setting: Path) -> None:
    ended = run("train", str(setting / "run.yaml"), "--output", str(setting / "no"), "--set", "model.vocab_size=40")
    assert ended.returncode == 2
    assert "holds the token 49, but the model's vocabulary is 40" in ended.stderr


def test_nothing_to_resume_is_said(setting: Path) -> None:
    ended = run(
        *("train", str(setting / "run.yaml"), "--output", str(setting / "new"), "--resume"),
        *("--set", "pipe.stages=1", "--set", "data_parallel.replicas=1"),
    )
    assert ended.returncode == 0, ended.stderr
    assert "there is nothing to resume in" in ended.stdout


def test_a_directory_with_a_run_is_not_overwritten_unasked(setting: Path, whole: Path) -> None:
    ended = run("train", str(setting / "run.yaml"), "--output", str(whole))
    assert ended.returncode == 2
    assert "--resume" in ended.stderr
    assert "--overwrite" in ended.stderr
