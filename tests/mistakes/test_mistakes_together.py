"""Mistakes and accidents among several processes: each ends every process soon, and says what happened and where.

Each process has a launcher's environment variables, and the store is kept outside of them, as under ``torchrun``.
"""

import re
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from penstock._core.waiting import EXIT_DEADLINE, EXIT_PEER
from support.mistake_jobs import fault_time, settings, train
from support.pool import Ended, run_fresh

LIMIT_S = 10.0
"""From the fault to the end of the last process, with a deadline of 5 s."""
FAILED = (1, EXIT_DEADLINE, EXIT_PEER)
REPLICAS = {"stages": 1, "replicas": 2}


@dataclass(frozen=True)
class Accident:
    """What goes wrong on one rank.

    Attributes:
        name: In words.
        faulty: The rank.
        fault: What it does; see :mod:`support.mistake_jobs`.
        all_say: Patterns in the standard error of every rank that is able to say anything.
        faulty_says: Patterns in that of the faulty rank.
        code: Exit code of the faulty rank; None for any that tells of a failure.
        shape: Stages, replicas, optimizer.
        theirs: What is different in the faulty rank's configuration.
        more: Further arguments of the job.
        silent: Whether the faulty rank cannot say anything.
    """

    name: str
    faulty: int
    fault: str = "none"
    all_say: tuple[str, ...] = ()
    faulty_says: tuple[str, ...] = ()
    code: int | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    silent: bool = False

    def run(self, folder: Path, env: dict[str, str] | None = None) -> list[Ended]:
        """Run it until every process has ended."""
        config = settings(**self.shape)
        theirs = None if self.theirs is None else settings(**{**self.shape, **self.theirs})
        world_size = config["pipe"]["stages"] * config["data_parallel"]["replicas"]
        return run_fresh(
            train,
            world_size,
            str(folder),
            config,
            faulty=self.faulty,
            fault=self.fault,
            theirs=theirs,
            launched=True,
            env=env,
            **self.more,
        )

    def check(self, ended: list[Ended], fault: float) -> None:
        """Check how and when the processes ended."""
        text = "\n".join(
            f"--- rank {e.rank} ended with {e.code}, {e.at - fault:.1f} s after the fault\n{e.stdout}{e.stderr}"
            for e in ended
        )
        print(f"{self.name}: the last process ended {max(e.at for e in ended) - fault:.1f} s after the fault")
        for e in ended:
            assert e.at - fault < LIMIT_S, f"rank {e.rank} ended too late\n{text}"
            faulty = e.rank == self.faulty
            codes = (self.code,) if faulty and self.code is not None else FAILED
            if faulty and self.name.endswith("not closing"):
                # gloo's threads outlive the group there, and now and then abort the interpreter as it ends
                codes = (0, -signal.SIGABRT)
            assert e.code in codes, f"rank {e.rank} ended with {e.code}, not {codes}\n{text}"
            patterns = () if faulty and self.silent else self.all_say
            for pattern in patterns + (self.faulty_says if faulty else ()):
                assert re.search(pattern, e.stderr, re.DOTALL), f"rank {e.rank} does not say {pattern!r}\n{text}"


def place(rank: int, stage: int, action: str, step: int = 2) -> str:
    """The pattern of where an error happened."""
    return rf"rank {rank}, step {step}, stage {stage}, {action}, micro-batch \d"


WAITS = (
    r"rank \d, (stage \d, (RECV|SEND)_[FB], micro-batch \d, peer rank \d|all-reduce over replicas"
    r"|(mean loss|number of real tokens[a-z ]*), peer rank \d)"
)
NOT_THE_SAME = (
    r"ValueError: not all ranks do the same: rank (\d) is (train|evaluat)ing at step 2 \(.*\), "
    r"but rank (?!\1)\d is (?!\2)(train|evaluat)ing at step 2 \(.*\); every rank must call train_batch and eval_batch"
)
LOST = f"WaitError: {WAITS}: failed: .*(Connection|peer)"

ACCIDENTS = [
    # Started differently
    Accident(
        "micro-batches that differ",
        1,
        all_say=(r"ValueError: .*train.micro_batch_size: rank 1 has 2, but rank 0 has 1\. Start all with the same",),
        theirs={"train.micro_batch_size": 2},
    ),
    Accident(
        "schedules that differ",
        1,
        all_say=('ValueError: .*pipe.schedule: rank 1 has "gpipe", but rank 0 has "1f1b"',),
        theirs={"pipe.schedule": "gpipe"},
    ),
    Accident(
        "seeds that differ", 1, all_say=("ValueError: .*seed: rank 1 has 4, but rank 0 has 3",), theirs={"seed": 4}
    ),
    Accident(
        "optimizers that differ",
        1,
        all_say=('ValueError: .*optimizer.name: rank 1 has "onebit_adam", but rank 0 has "adamw"',),
        shape=REPLICAS,
        theirs={"optimizer": "onebit_adam"},
    ),
    Accident(
        "layouts that differ",
        0,
        all_say=("ValueError: .*pipe.stages: rank 1 has 2, but rank 0 has 1",),
        theirs=REPLICAS,
    ),
    Accident(
        "models that differ",
        1,
        all_say=("ValueError: .*(number of layers|first layer of stage 1): rank 1 has 3, but rank 0 has 2",),
        more={"layers": 6},
    ),
    Accident(
        "data that differ",
        1,
        all_say=("ValueError: .*samples in the training data: rank 1 has 60, but rank 0 has 64",),
        more={"samples": 60},
    ),
    Accident(
        "another version of Penstock",
        1,
        "version",
        all_say=('ValueError: .*penstock version: rank 1 has "0.0.1", but rank 0 has',),
    ),
    Accident(
        "rank 0 never arrives", 0, "absent", ("WaitError: .*rank 0 did not arrive within 5 s",), code=9, silent=True
    ),
    Accident(
        "rank 1 never arrives", 1, "absent", ("WaitError: .*rank 1 did not arrive within 5 s",), code=9, silent=True
    ),
    # Errors in the user's code
    Accident(
        "a layer that raises, on one of two replicas",
        0,
        "raise",
        ("ArithmeticError: the layer is unwell", place(0, 0, "F")),
        shape={"stages": 2, "replicas": 2},
    ),
    Accident(
        "a layer that raises in the backward pass",
        1,
        "raise in backward",
        ("ArithmeticError: the gradient is unwell", place(1, 1, "B")),
    ),
    Accident("a loss that raises", 1, "loss", ("ArithmeticError: the loss is unwell", place(1, 1, "F"))),
    Accident(
        "a loss that is a vector",
        1,
        "vector",
        (r"ValueError: stage 1: loss_fn \(loss\) must return a scalar, got .* \(1,\); reduce it", place(1, 1, "F")),
    ),
    Accident(
        "a value that cannot be sent",
        0,
        "value",
        (r"ValueError: the output of stage 0\['hidden'\]\[1\] is of unsupported type builtins.set", place(0, 0, "F")),
    ),
    Accident(
        "an iterator that ends early on one rank",
        1,
        "iterator",
        (
            "ValueError: the data iterator of replica 0 ended after 0 of the 4 micro-batches",
            "rank 1, train_batch, step 2",
        ),
    ),
    Accident(
        "a dataset that raises on one rank",
        0,
        "dataset",
        (r"OSError: sample \d+ cannot be read", "rank 0, train_batch, step 2"),
    ),
    Accident(
        "a loss that is not a number",
        1,
        "nan",
        ("NotFiniteError: step 2: the loss is nan; lower the learning rate, look at the samples at positions 16 and",),
        shape=REPLICAS,
    ),
    Accident(
        "a damaged layer of a checkpoint, which one rank reads",
        1,
        "checkpoint",
        ("CorruptFileError: .*layer_003.safetensors: its SHA-256 differs", "rank 1, load_checkpoint, step 2"),
    ),
    # Ranks that do not do the same
    Accident(
        "one stage evaluates while the other trains",
        1,
        "eval",
        (NOT_THE_SAME,),
    ),
    Accident(
        "one replica evaluates while the other trains",
        1,
        "eval",
        (NOT_THE_SAME,),
        shape=REPLICAS,
    ),
    Accident("a rank that leaves early", 1, "leave", (LOST,), code=0, silent=True),
    Accident(
        "a rank that leaves early, not closing", 1, "leave without close", (LOST,), code=0, silent=True, shape=REPLICAS
    ),
    Accident("sys.exit on one rank", 1, "exit", ("SystemExit: 3", place(1, 1, "F")), code=3, silent=True),
    # Processes that die or hang
    Accident("the first stage is killed", 0, "kill", (LOST, "peer rank 0"), code=-signal.SIGKILL, silent=True),
    Accident("the last stage is killed", 1, "kill", (LOST, "peer rank 1"), code=-signal.SIGKILL, silent=True),
    Accident("a replica is killed", 1, "kill", (LOST,), code=-signal.SIGKILL, silent=True, shape=REPLICAS),
    Accident(
        "a replica is killed under 1-bit Adam",
        0,
        "kill",
        (LOST,),
        code=-signal.SIGKILL,
        silent=True,
        shape={**REPLICAS, "optimizer": "onebit_adam"},
    ),
    Accident(
        "a rank that sleeps for ever",
        0,
        "sleep",
        ("rank 1, stage 1, RECV_F, micro-batch 0, peer rank 0: still waiting after 5",),
        ("Its main thread was here:.*in strike",),
    ),
    Accident(
        "a replica's last stage that sleeps for ever under 1-bit Adam",
        3,
        "sleep",
        (rf"{WAITS}: still waiting after 5",),
        ("Its main thread was here:.*in strike",),
        shape={"stages": 2, "replicas": 2, "optimizer": "onebit_adam"},
    ),
    Accident("Ctrl-C on one rank", 0, "interrupt", ("KeyboardInterrupt", place(0, 0, "F")), code=-signal.SIGINT),
    Accident("SIGTERM on one rank", 1, "terminate", (LOST, "peer rank 1"), code=-signal.SIGTERM, silent=True),
]


@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda accident: accident.name)
def test_an_accident_ends_every_process(accident: Accident, tmp_path: Path) -> None:
    ended = accident.run(tmp_path)
    accident.check(ended, fault_time(tmp_path))


def test_rank_zero_that_keeps_the_store_itself_is_killed(tmp_path: Path) -> None:
    # Without a launcher that keeps the store (under SLURM, for example) it goes with rank 0.
    accident = Accident("rank 0 is killed", 0, "kill", ("WaitError|store is gone",), code=-signal.SIGKILL, silent=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = accident.run(tmp_path, {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)})
    accident.check(ended, fault_time(tmp_path))
