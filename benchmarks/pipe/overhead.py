"""What an engine costs: 1F1B over two ranks with layers so small that hardly anything but the engine is left.

Penstock beside torch.distributed.pipelining and, where it is installed, DeepSpeed: the same layers, micro-batches and
optimizer, in the same processes, round by round in turn. Wall-clock and CPU time per micro-batch and rank; *net* is
less what the layers, the loss and autograd cost in a plain loop on this rank alone::

    python -m benchmarks.pipe.overhead
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.pipe.processes import run_ranks

MICRO_BATCHES, WIDTH, ROWS = 32, 16, 2
ROUNDS, STEPS, WARMUP = 15, 10, 5
RESULTS = Path(__file__).parents[1] / "results" / "pipe"

Step = Callable[[], object]


def _layers() -> list[Any]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return [nn.Linear(WIDTH, WIDTH) for _ in range(2)]


def _data() -> tuple[Any, Any]:
    import torch

    return torch.randn(MICRO_BATCHES * ROWS, WIDTH), torch.randn(MICRO_BATCHES * ROWS, WIDTH)


def _penstock(rank: int) -> Step:
    import torch
    from torch.nn.functional import mse_loss

    from penstock._core.waiting import Watcher
    from penstock.compression import LocalGradients
    from penstock.pipe import MicroBatch, PipeDataParallelTopology, PipelineModule
    from penstock.pipe.engine import PipelineEngine
    from penstock.pipe.groups import PipeGroups

    watcher = Watcher(rank=rank, deadline_s=60.0).start()
    groups = PipeGroups(PipeDataParallelTopology(2, 1), watcher=watcher)
    stage = PipelineModule(_layers(), num_stages=2, partition_method="uniform").build_stage(rank)
    exchange = LocalGradients(list(stage.parameters()), replicas=1)
    engine = PipelineEngine(
        stage,
        schedule="1f1b",
        micro_batches=MICRO_BATCHES,
        groups=groups,
        exchange=exchange,
        loss_fn=mse_loss,
        watcher=watcher,
    )
    optimizer = torch.optim.SGD(stage.parameters(), lr=1e-3)
    inputs, targets = (part.split(ROWS) for part in _data())
    batches = [
        MicroBatch(inputs[i] if rank == 0 else None, targets[i] if rank == 1 else None, i) for i in range(MICRO_BATCHES)
    ]
    number = 0

    def step() -> None:
        nonlocal number
        engine.train_step(batches, step=number)
        number += 1
        optimizer.step()
        optimizer.zero_grad()

    return step


def _torch(rank: int) -> Step:
    import torch
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    from torch.nn.functional import mse_loss

    layer = _layers()[rank]
    schedule = Schedule1F1B(
        PipelineStage(layer, rank, 2, torch.device("cpu")), n_microbatches=MICRO_BATCHES, loss_fn=mse_loss
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    inputs, targets = _data()

    def step() -> None:
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _deepspeed(rank: int) -> Step:
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule
    from torch.nn.functional import mse_loss

    deepspeed.init_distributed("gloo", dist_init_required=False)
    module = PipelineModule(_layers(), num_stages=2, partition_method="uniform", loss_fn=mse_loss)
    settings = {
        "train_batch_size": MICRO_BATCHES * ROWS,
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    inputs, targets = (part.split(ROWS) for part in _data())

    def forever() -> Any:
        while True:
            yield from zip(inputs, targets, strict=True)

    endless = forever()
    return lambda: engine.train_batch(endless)


def _bare(rank: int) -> Step:
    import torch
    from torch.nn.functional import mse_loss

    layer = _layers()[rank]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    inputs, targets = (part.split(ROWS) for part in _data())
    gradients = [torch.ones(ROWS, WIDTH)] * MICRO_BATCHES

    def step() -> None:
        for x, y, gradient in zip(inputs, targets, gradients, strict=True):
            if rank == 0:
                layer(x).backward(gradient)
            else:
                mse_loss(layer(x.detach().requires_grad_()), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _worker(rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    contenders = {"bare loop": _bare(rank), "penstock": _penstock(rank), "torch": _torch(rank)}
    if find_spec("deepspeed") is not None:
        contenders["deepspeed"] = _deepspeed(rank)
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in contenders}
    for step in contenders.values():
        for _ in range(WARMUP):
            step()
    for _ in range(ROUNDS):
        for name, step in contenders.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                step()
            dist.barrier()
            for kind, spent in (("wall", time.perf_counter() - wall), ("cpu", time.process_time() - cpu)):
                found[name][kind].append(spent / STEPS / MICRO_BATCHES * 1e6)
    print(json.dumps(found), flush=True)
    dist.barrier()
    sys.stdout.flush()
    # Groups of three engines are under way; none of them is needed any more.
    import os

    os._exit(0)


def main() -> None:
    """Run, and write results/pipe/overhead.{json,md}."""
    answers = run_ranks("benchmarks.pipe.overhead", 2)
    summary: dict[str, Any] = {}
    for name in answers[0]:
        summary[name] = {}
        for kind in ("wall", "cpu"):
            rounds = [statistics.mean(pair) for pair in zip(*(answer[name][kind] for answer in answers), strict=True)]
            quartiles = statistics.quantiles(rounds, n=4)
            summary[name][kind] = {"median": quartiles[1], "low": quartiles[0], "high": quartiles[2]}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = _table(summary)
    (RESULTS / "overhead.md").write_text(text)
    print(text)


def _table(summary: dict[str, Any]) -> str:
    lines = [
        f"# Overhead of an engine: 1F1B, 2 ranks, {MICRO_BATCHES} micro-batches, one {WIDTH}x{WIDTH} layer per stage",
        "",
        f"Microseconds per micro-batch and rank, optimizer step included; median (quartiles) of {ROUNDS} rounds in "
        f"turn of {STEPS} steps each, all contenders in the same processes. *Net* is less the bare loop.",
        "",
        "| | wall-clock | CPU | net wall | net CPU | penstock's share of wall, CPU | of net wall, net CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    net = {
        name: {k: row[k]["median"] - summary["bare loop"][k]["median"] for k in row} for name, row in summary.items()
    }
    for name, row in summary.items():
        cells = [f"{row[k]['median']:.0f} ({row[k]['low']:.0f}-{row[k]['high']:.0f})" for k in ("wall", "cpu")]
        cells += [f"{net[name][k]:.0f}" if name != "bare loop" else "" for k in ("wall", "cpu")]
        if name in ("torch", "deepspeed"):
            cells.append(_shares({k: summary["penstock"][k]["median"] / row[k]["median"] for k in row}))
            cells.append(_shares({k: net["penstock"][k] / net[name][k] for k in row}))
        lines.append(f"| {name} | " + " | ".join(cells + [""] * (6 - len(cells))) + " |")
    if "deepspeed" not in summary:
        lines += ["", "DeepSpeed was not installed."]
    return "\n".join(lines) + "\n"


def _shares(of: dict[str, float]) -> str:
    return f"{of['wall']:.2f}, {of['cpu']:.2f}"


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _worker(int(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
