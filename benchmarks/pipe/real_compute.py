"""Real compute on two cores: a step over two ranks against what its schedule allows.

Each stage's F, I and W are timed on its own rank while the other rank computes its own, so that both cores share caches
and memory as they do in the run. The schedule's makespan, simulated with these costs and no transfer, is the bound; the
*share* is that makespan over the measured step, which is the speed-up over the bound's speed-up::

    python -m benchmarks.pipe.real_compute
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.pipe.processes import run_ranks

MICRO_BATCHES, WIDTH, DEPTH, ROWS, REPEATS = 16, 1024, 12, 128, 9
SCHEDULES = ("gpipe", "1f1b", "zb_h1")
RESULTS = Path(__file__).parents[1] / "results" / "pipe"


def _layers() -> list[Any]:
    from torch import nn

    from penstock.pipe import LayerSpec

    return [LayerSpec(nn.Sequential, nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2 * DEPTH)]


def _costs(stage: Any, rank: int) -> dict[str, float]:
    """Seconds of one F, I and W, and of a whole B, of this rank's stage."""
    import torch

    from penstock.pipe.split_backward import SplitBackward

    split = SplitBackward()
    found: dict[str, list[float]] = {op: [] for op in "FIWB"}
    for whole in (True, False):
        for _ in range(MICRO_BATCHES):
            x = torch.randn(ROWS, WIDTH).requires_grad_(rank > 0)
            cuts: list[Any] | None = None if whole or rank > 0 else []
            at = [time.perf_counter()]
            output = stage(x, None, cuts).square().mean()
            at.append(time.perf_counter())
            if whole:
                output.backward()
            else:
                leaves = [x] if rank > 0 else []
                _, work = split.input_half([output], [torch.ones(())], leaves, cuts[0] if cuts else None)
                at.append(time.perf_counter())
                work.run()
            at.append(time.perf_counter())
            for op, start, end in zip("FB" if whole else "FIW", at, at[1:], strict=False):
                found[op].append(end - start)
    return {op: statistics.median(seconds) for op, seconds in found.items()}


def _worker(rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.functional import mse_loss

    from penstock._core.waiting import Watcher
    from penstock.compression import LocalGradients
    from penstock.pipe import MicroBatch, PipeDataParallelTopology, PipelineModule
    from penstock.pipe.engine import PipelineEngine
    from penstock.pipe.groups import PipeGroups
    from penstock.pipe.schedule import get_schedule

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    watcher = Watcher(rank=rank, deadline_s=60.0)
    groups = PipeGroups(PipeDataParallelTopology(ranks, 1), watcher=watcher)
    stage = PipelineModule(_layers(), num_stages=ranks, partition_method="uniform").build_stage(rank)
    batches = [MicroBatch(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH), i) for i in range(MICRO_BATCHES)]
    engines = {
        name: PipelineEngine(
            stage,
            schedule=get_schedule(name, ranks, MICRO_BATCHES),
            micro_batches=MICRO_BATCHES,
            groups=groups,
            exchange=LocalGradients(list(stage.parameters()), replicas=1),
            loss_fn=mse_loss,
            watcher=watcher,
        )
        for name in SCHEDULES
    }
    costs, spans = [], {name: [] for name in SCHEDULES}  # type: ignore[var-annotated]
    for repeat in range(REPEATS + 1):
        dist.barrier()
        costs.append(_costs(stage, rank))
        for name, engine in engines.items():
            stage.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            engine.train_step(batches, step=repeat)
            spans[name].append((start, time.perf_counter()))
    # The first round warms up.
    print(json.dumps({"costs": costs[1:], "spans": {n: s[1:] for n, s in spans.items()}}), flush=True)
    dist.barrier()
    os._exit(0)  # the engines' groups need no orderly end


def main() -> None:
    """Measure, and write results/pipe/real_compute.{json,md}."""
    from penstock.pipe.schedule import Costs, get_schedule, simulate

    answers = run_ranks("benchmarks.pipe.real_compute", 2)
    summary: dict[str, Any] = {}
    for name in SCHEDULES:
        schedule = get_schedule(name, 2, MICRO_BATCHES)
        shares, speedups, bounds = [], [], []
        for repeat in range(REPEATS):
            per_op = {op: [answer["costs"][repeat][op] for answer in answers] for op in "FIWB"}
            if name == "zb_h1":
                costs = Costs(per_op["F"], per_op["I"], per_op["W"])
                serial = sum(sum(per_op[op]) for op in "FIW")
            else:
                # Whole backward passes: I stands for B.
                costs = Costs(per_op["F"], per_op["B"], [0.0, 0.0])
                serial = sum(sum(per_op[op]) for op in "FB")
            makespan = simulate(schedule, costs).makespan
            spans = [answer["spans"][name][repeat] for answer in answers]
            seconds = max(end for _, end in spans) - min(start for start, _ in spans)
            shares.append(makespan / seconds)
            bounds.append(serial * MICRO_BATCHES / makespan)
            speedups.append(serial * MICRO_BATCHES / seconds)
        summary[name] = {
            "share": statistics.median(shares),
            "low": min(shares),
            "high": max(shares),
            "bound": statistics.median(bounds),
            "speedup": statistics.median(speedups),
        }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "real_compute.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [
        f"# Real compute: 2 ranks, {MICRO_BATCHES} micro-batches of {ROWS} rows, {DEPTH} layers of {WIDTH} per stage",
        "",
        f"Median of {REPEATS} repeats (lowest-highest); the costs of F, I and W are measured on both cores at once.",
        "",
        "| schedule | speed-up | the schedule's bound | share of the bound |",
        "|---|---|---|---|",
    ]
    for name, row in summary.items():
        share = f"{row['share']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
        lines.append(f"| {name} | {row['speedup']:.3f} | {row['bound']:.3f} | {share} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "real_compute.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _worker(int(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
