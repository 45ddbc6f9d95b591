"""Every fault ends every process, soon, with an error that says what and where."""

import datetime
import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock._core.waiting import EXIT_DEADLINE, EXIT_PEER, Watcher
from penstock.pipe import LayerSpec, MicroBatch, PipeDataParallelTopology, PipelineModule
from penstock.pipe.engine import PipelineEngine
from penstock.pipe.groups import PipeGroups
from support.pipe_exchange import PlainExchange
from support.pool import Ended, WorkerPool, run_fresh

DEADLINE_S = 5.0
LIMIT_S = 10.0
STEPS = 400
"""More than any test waits for: the fault must end the run."""


class Layer(nn.Module):
    """Linear; misbehaves at micro-batch ``at`` of step 1 in the way told."""

    def __init__(self, fault: str | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.fault = fault
        self.calls = 0

    def forward(self, value: Any) -> Any:
        self.calls += 1
        output = self.linear(value)
        if self.fault is None or self.calls < 7:
            return output
        tell_time()
        if self.fault == "forward":
            raise ArithmeticError("the layer is unwell")
        if self.fault == "backward":
            return Unwell.apply(output)
        if self.fault == "value":
            return {"hidden": [output, {1, 2}]}
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "sleep":
            time.sleep(60)
        return output


class Unwell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise ArithmeticError("the gradient is unwell")


def tell_time() -> None:
    print(f"FAULT {time.time()}", flush=True)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def vector_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(dim=1)


def work(
    rank: int,
    world_size: int,
    pipe: int,
    *,
    faulty: int = -1,
    fault: str | None = None,
    micro_batches: list[int] | None = None,
    given: list[int] | None = None,
    dims: list[int] | None = None,
    seeds: list[int] | None = None,
    loss: str = "mean_loss",
    wide: int = -1,
    late: int = -1,
) -> None:
    """Train until something happens."""
    if rank == late:
        tell_time()
        time.sleep(60)
    replicas = dims[rank] if dims else world_size // pipe
    module = PipelineModule(
        [LayerSpec(Layer, fault if index == faulty else None) for index in range(4)],
        num_stages=pipe,
        partition_method="uniform",
        loss_fn=globals()[loss],
    )
    store = torch.distributed.distributed_c10d._get_default_store()
    with Watcher(rank=rank, deadline_s=DEADLINE_S, store=store) as watcher:
        if micro_batches or given:
            tell_time()
        groups = PipeGroups(
            PipeDataParallelTopology(pipe, replicas),
            watcher=watcher,
            timeout=datetime.timedelta(seconds=30),
        )
        m = micro_batches[rank] if micro_batches else 4
        stage = module.build_stage(groups.pipe_rank)
        if rank == wide:
            stage = stage.double()
        engine = PipelineEngine(
            stage,
            micro_batches=m,
            groups=groups,
            exchange=PlainExchange(stage.parameters(), groups.replicas),
            loss_fn=module.loss_fn,
            watcher=watcher,
            seed=seeds[rank] if seeds else 1,
        )
        count = given[rank] if given else m
        for step in range(STEPS):
            stage.zero_grad()
            if loss != "mean_loss":
                tell_time()
            x = torch.ones(2, 4)
            engine.train_step([MicroBatch(x, x, index) for index in range(count)], step=step)
            time.sleep(0.02)


def error_of(rank: int, world_size: int, pipe: int, **kwargs: Any) -> str:
    """What ``work`` raises."""
    try:
        work(rank, world_size, pipe, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def run(world_size: int, pipe: int, *, absent: int | None = None, **kwargs: Any) -> list[Ended]:
    """Run ``work`` until every process has ended, and check that the fault ended each of them in time.

    ``absent`` is a rank that is killed in the end, if it has not killed itself: nothing is asked of it.
    """
    start = time.time()
    kill = {absent: 12.0} if absent is not None and "late" in kwargs else None
    ended = run_fresh(work, world_size, pipe, deadline_s=40, kill=kill, **kwargs)
    text = "\n".join(f"--- rank {e.rank} ended with {e.code}, {e.seconds:.1f} s\n{e.stdout}{e.stderr}" for e in ended)
    faults = [float(found) for found in re.findall(r"FAULT ([0-9.]+)", text)]
    assert faults, text
    for e in ended:
        if e.rank != absent:
            assert start + e.seconds - min(faults) < LIMIT_S, f"rank {e.rank} ended too late\n{text}"
            assert e.code in (1, EXIT_DEADLINE, EXIT_PEER), text
    return ended


def all_say(ended: list[Ended], *patterns: str, absent: int | None = None) -> None:
    for e in ended:
        for pattern in patterns:
            if e.rank != absent:
                assert re.search(pattern, e.stderr, re.DOTALL), f"rank {e.rank} does not say {pattern!r}:\n{e.stderr}"


def test_a_layer_that_raises_in_forward() -> None:
    ended = run(2, 2, faulty=0, fault="forward")
    all_say(ended, "ArithmeticError: the layer is unwell", "rank 0, step 1, stage 0, F, micro-batch 2")


def test_a_layer_that_raises_in_backward() -> None:
    ended = run(4, 2, faulty=3, fault="backward")
    all_say(ended, "ArithmeticError: the gradient is unwell", r"rank [23], step 1, stage 1, B, micro-batch \d")


def test_a_rank_killed_in_the_middle_of_a_step() -> None:
    ended = run(4, 4, faulty=1, fault="kill", absent=1)
    assert ended[1].code == -signal.SIGKILL
    all_say(ended, r"stage \d, (RECV|SEND)_[FB], micro-batch \d, peer rank \d|mean loss", "Connection", absent=1)


def test_a_rank_that_is_stuck() -> None:
    # The stuck process waits for nobody, but its watcher hears of the others' deadline.
    ended = run(3, 3, faulty=2, fault="sleep")
    all_say(ended, r"rank \d, stage \d, RECV_[FB], micro-batch \d, peer rank \d: still waiting after 5")


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_never_arrives(late: int) -> None:
    ended = run(3, 3, late=late, absent=late)
    all_say(ended, f"rank {late} did not arrive within 5 s", absent=late)


def test_numbers_of_micro_batches_that_differ_between_ranks() -> None:
    ended = run(3, 3, micro_batches=[4, 4, 8])
    all_say(ended, "ValueError.*micro-batches per step: rank 2 has 8, but ranks 0, 1 have 4")


def test_a_batch_with_too_few_micro_batches() -> None:
    ended = run(2, 2, given=[4, 3])
    all_say(ended, "ValueError: got 3 micro-batches, but a step of this engine has 4 per replica")


def test_a_loss_that_is_a_vector() -> None:
    ended = run(2, 2, loss="vector_loss")
    all_say(ended, r"ValueError: stage 1: loss_fn \(vector_loss\) must return a scalar, got a tensor of shape \(2,\)")


def test_a_value_that_cannot_be_sent() -> None:
    ended = run(2, 2, faulty=1, fault="value")
    all_say(ended, r"ValueError: the output of stage 0\['hidden'\]\[1\] is of unsupported type builtins.set")


def test_settings_that_differ_are_named_on_every_rank(pool: WorkerPool) -> None:
    seeds = pool.run(error_of, 2, 2, seeds=[1, 2])
    assert all("seed: rank 1 has 2, but rank 0 has 1" in text for text in seeds)
    dtypes = pool.run(error_of, 2, 1, wide=1)
    assert all(re.search("parameters of stage 0: rank 1 has .*float64.*but rank 0 has .*float32", t) for t in dtypes)


def test_a_wrong_world_size_is_refused(pool: WorkerPool) -> None:
    texts = pool.run(error_of, 2, 1, dims=[3, 3])
    assert all("needs 3 processes, but 2 are running" in text for text in texts)
