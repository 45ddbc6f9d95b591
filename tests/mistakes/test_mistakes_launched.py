"""``penstock train`` launches its own processes: however one of them or the launcher ends, none is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from penstock.data_pipeline.data_sampling import IndexedDatasetBuilder
from penstock.runtime.checkpoint import latest_complete

LIMIT_S = 10.0
"""From the fault to the end of the last process, with a deadline of 5 s."""
MARK = "PENSTOCK_TEST_MARK"


class Run:
    """A run under way: 2 stages, far more steps than it will live for, its processes known by a mark."""

    def __init__(self, folder: Path) -> None:
        with IndexedDatasetBuilder(folder / "corpus", np.uint16) as builder:
            builder.add_item(np.arange(2000) % 50)
            builder.end_document()
        config = folder / "run.yaml"
        config.write_text(f"""
deadline_s: 5
model: {{vocab_size: 50, num_layers: 2, hidden_size: 8, num_heads: 2, context: 8}}
pipe: {{stages: 2}}
train: {{global_batch_size: 4, micro_batch_size: 1, steps: 100000}}
data: {{train: {folder / "corpus"}}}
output: {folder / "run"}
""")
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "penstock", "train", str(config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: self.mark},
            )

    def processes(self) -> dict[int, int | None]:
        """The ranks of the living processes of this run, by process id; None for one that has no rank."""
        found: dict[int, int | None] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # gone meanwhile, or another user's
                    environment = (entry / "environ").read_bytes()
                    zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                    if f"{MARK}={self.mark}".encode() in environment and not zombie:
                        rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", environment)
                        found[int(entry.name)] = None if rank is None else int(rank[1])
        return found

    def until_training(self) -> None:
        """Wait until some steps are done."""
        metrics = self.folder / "run" / "metrics.jsonl"
        until = time.monotonic() + 60
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert self.launcher.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def until_gone(self) -> float:
        """Wait until no process of the run is left; returns the seconds it took."""
        start = time.monotonic()
        while True:
            self.launcher.poll()
            left = self.processes()
            seconds = time.monotonic() - start
            if not left:
                self.launcher.wait(LIMIT_S)
                return seconds
            assert seconds < LIMIT_S, f"{left} are left after {seconds:.1f} s\n{self.log.read_text()}"
            time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    run.until_training()
    yield run
    for process in run.processes():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    run.launcher.wait()


def test_a_killed_worker_ends_the_run(run: Run) -> None:
    ranks = {rank: process for process, rank in run.processes().items()}
    os.kill(ranks[1], signal.SIGKILL)
    run.until_gone()
    assert run.launcher.returncode == 1
    text = run.log.read_text()
    assert "penstock: rank 1 failed first, ended by SIGKILL" in text


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_launcher_is_the_end_of_its_workers(run: Run, how: signal.Signals) -> None:
    assert set(run.processes().values()) >= {0, 1}
    run.launcher.send_signal(how)
    run.until_gone()
    assert run.launcher.returncode != 0


@pytest.mark.parametrize("whom", ["the launcher", "one rank"])
def test_sigterm_finishes_the_step_saves_and_exits(run: Run, whom: str) -> None:
    if whom == "the launcher":
        run.launcher.send_signal(signal.SIGTERM)
    else:
        ranks = {rank: process for process, rank in run.processes().items()}
        os.kill(ranks[1], signal.SIGTERM)
    run.until_gone()
    text = run.log.read_text()
    assert run.launcher.returncode == 128 + signal.SIGTERM, text
    said = re.search(r"stopped by SIGTERM after step (\d+), saved; go on by --resume", text)
    assert said is not None, text
    steps = int(said[1])
    assert len((run.folder / "run" / "metrics.jsonl").read_text().splitlines()) == steps
    checkpoint = latest_complete(run.folder / "run" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.read_state()["progress"]["step"] == steps
