"""Stages that sleep: how close a step comes to the makespan that the schedule promises, for every schedule.

A layer sleeps 20 ms forward, 20 ms for the gradient of its input and 20 ms for that of its weight, so any number of
ranks fit on one machine and nothing but the engine is late. The *ratio* is the step's time over the makespan simulated
without transfer, in units of what a sleep of 20 ms takes while all ranks sleep at once, measured in the same run.
Beside it, in turn: a bare loop written by hand for these layers (autograd, and messages that are posted ahead and not
waited for), and the schedules of torch.distributed.pipelining, each over the makespan of its own table::

    python -m benchmarks.pipe.sleeping                                    # everything: about 70 minutes
    python -m benchmarks.pipe.sleeping --ranks 4 --micro-batches 8 --schedules 1f1b,zb_v --repeats 3

Each cell is kept in results/pipe/sleeping.json as it is done.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pipe.processes import run_ranks

SECONDS = 0.020
RESULTS = Path(__file__).parents[1] / "results" / "pipe"
RANKS, MICRO_BATCHES = (4, 8), (8, 16, 32)
SCHEDULES = (
    *("gpipe", "1f1b", "looped_bfs", "interleaved_1f1b", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe_v"),
)
TORCH = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "looped_bfs": "ScheduleLoopedBFS",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "zb_h1": "ScheduleInterleavedZeroBubble",
    "zb_v": "ScheduleZBVZeroBubble",
    "dualpipe_v": "ScheduleDualPipeV",
}

Span = tuple[float, float]


def _modules() -> tuple[Any, Any]:
    """The layers: one that gives the first stage something to differentiate, and the one that sleeps."""
    import torch
    from torch import nn

    class SleepBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            time.sleep(SECONDS)
            return gradients[0]

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8))

        def forward(self, x: Any) -> Any:
            return x + self.weight

    class Sleeper(Shift):
        def forward(self, x: Any) -> Any:
            time.sleep(SECONDS)
            return SleepBackward.apply(x) + SleepBackward.apply(self.weight)

    return Shift, Sleeper


def _data(micro_batches: int) -> tuple[Any, Any]:
    import torch

    return torch.ones(micro_batches, 8), torch.ones(micro_batches, 8)


def _penstock(rank: int, ranks: int, schedule: Any) -> Callable[[], Span]:
    from torch.nn.functional import mse_loss

    from penstock._core.waiting import Watcher
    from penstock.compression import LocalGradients
    from penstock.pipe import LayerSpec, MicroBatch, PipeDataParallelTopology, PipelineModule
    from penstock.pipe.engine import PipelineEngine
    from penstock.pipe.groups import PipeGroups

    shift, sleeper = _modules()
    layers = [LayerSpec(shift), *(LayerSpec(sleeper) for _ in range(schedule.num_stages))]
    bounds = [0, *range(2, schedule.num_stages + 2)]
    module = PipelineModule(layers, num_stages=schedule.num_stages, partition_method=bounds)
    watcher = Watcher(rank=rank, deadline_s=60.0)
    groups = PipeGroups(PipeDataParallelTopology(ranks, 1), watcher=watcher)
    stages = [module.build_stage(stage) for stage in schedule.stages_of(rank)]
    engine = PipelineEngine(
        stages,
        schedule=schedule,
        micro_batches=schedule.micro_batches,
        groups=groups,
        exchange=LocalGradients([p for stage in stages for p in stage.parameters()], replicas=1),
        loss_fn=mse_loss,
        watcher=watcher,
    )
    inputs, targets = (part.split(1) for part in _data(schedule.micro_batches))
    batches = [MicroBatch(inputs[i], targets[i], i) for i in range(schedule.micro_batches)]

    def step() -> Span:
        start = time.perf_counter()
        engine.train_step(batches, step=0)
        return start, time.perf_counter()

    return step


def _bare(rank: int, ranks: int, schedule: Any) -> Callable[[], Span]:
    """The same layers and messages, and nothing else: what anyone would write for these layers and this table."""
    import torch
    import torch.distributed as dist
    from torch.nn.functional import mse_loss

    from penstock.pipe.schedule import channel_of, place_communication

    shift, sleeper = _modules()
    layers = {s: [shift(), sleeper()] if s == 0 else [sleeper()] for s in schedule.stages_of(rank)}
    groups = {direction: dist.new_group(list(range(ranks))) for direction in "FB"}
    steps = [
        (action, channel_of(action, schedule.placement) if "_" in action.op else None)
        for action in place_communication(schedule)[rank]
    ]
    inputs, targets = (part.split(1) for part in _data(schedule.micro_batches))
    one, last = torch.ones(()), schedule.num_stages - 1
    parameters = {stage: list(stack[-1].parameters()) for stage, stack in layers.items()}

    def step() -> Span:
        start = time.perf_counter()
        posted: dict[Any, list[Any]] = {}
        for action, channel in steps:
            if channel is not None and action.op.startswith("RECV"):
                buffer = torch.empty(1, 8)
                work = groups[channel.direction].recv([buffer], channel.source, 0)
                posted.setdefault(channel, []).append((work, buffer))
        values: dict[Any, Any] = {("F", 0, m): inputs[m] for m in range(schedule.micro_batches)}
        values |= {("B", last, m): one for m in range(schedule.micro_batches)}
        graphs: dict[Any, Any] = {}
        sends = []
        for (stage, op, m), channel in steps:
            if channel is not None and op.startswith("RECV"):
                work, values[op[-1], stage, m] = posted[channel].pop(0)
                work.wait()
            elif channel is not None:
                onward = stage + 1 if op == "SEND_F" else stage - 1
                sends.append(groups[channel.direction].send([values[op[-1], onward, m]], channel.target, 0))
            elif op == "F":
                x = values["F", stage, m]
                if stage == 0:
                    # As in the engine, the first layer's own backward pass, which costs nothing here, is apart.
                    x = layers[0][0](x).detach()
                y = layers[stage][-1](x.requires_grad_())
                values["F", stage + 1, m] = y.detach()
                graphs[stage, m] = x, mse_loss(y, targets[m]) if stage == last else y
            else:
                (x, y), gradient = graphs[stage, m], values["B", stage, m]
                if op == "I":
                    values["B", stage - 1, m] = torch.autograd.grad(y, x, gradient, retain_graph=True)[0]
                elif op == "W":
                    torch.autograd.backward(y, gradient, inputs=parameters[stage])
                else:
                    torch.autograd.backward(y, gradient)
                    values["B", stage - 1, m] = x.grad
        for work in sends:
            work.wait()
        return start, time.perf_counter()

    return step


def _torch(rank: int, ranks: int, name: str, micro_batches: int, chunks: int) -> tuple[Callable[[], Span], Any]:
    """The step, and torch's own table as a schedule of ours (None where it keeps none)."""
    import torch
    from torch import nn
    from torch.distributed import pipelining
    from torch.nn.functional import mse_loss

    from penstock.pipe.schedule import Schedule

    shift, sleeper = _modules()
    kind = getattr(pipelining, TORCH[name], None) or getattr(pipelining.schedules, TORCH[name])
    stages = ranks * chunks
    mine = [rank, stages - 1 - rank] if name in ("zb_v", "dualpipe_v") else list(range(rank, stages, ranks))
    built = [
        pipelining.PipelineStage(
            nn.Sequential(shift(), sleeper()) if index == 0 else sleeper(), index, stages, torch.device("cpu")
        )
        for index in mine
    ]
    single = name in ("gpipe", "1f1b")
    schedule = kind(built[0] if single else built, n_microbatches=micro_batches, loss_fn=mse_loss)
    inputs, targets = _data(micro_batches)
    table = None
    order = getattr(schedule, "pipeline_order", None)
    if not single and order:
        text = "".join(",".join("" if a is None else str(a) for a in order[r]) + "\n" for r in range(ranks))
        table = Schedule.from_text(text, f"torch {name}")
    first, last = 0 in mine, stages - 1 in mine

    def step() -> Span:
        start = time.perf_counter()
        schedule.step(*([inputs] if first else []), **({"target": targets} if last else {}))
        return start, time.perf_counter()

    return step, table


def _worker(rank: int, ranks: int, name: str, micro_batches: int, repeats: int) -> None:
    import torch
    import torch.distributed as dist

    from penstock.pipe.schedule import get_schedule, simulate

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    schedule = get_schedule(name, ranks, micro_batches)
    makespan = simulate(schedule).makespan
    makespans = {"penstock": makespan, "bare loop": makespan}
    contenders = {"penstock": _penstock(rank, ranks, schedule), "bare loop": _bare(rank, ranks, schedule)}
    failed = ""
    if name in TORCH:
        try:
            contenders["torch"], table = _torch(rank, ranks, name, micro_batches, schedule.num_stages // ranks)
            makespans["torch"] = makespan if table is None else simulate(table).makespan
            contenders["torch"]()
        except Exception as error:  # a size that torch's schedule does not take
            failed = f"{type(error).__name__}: {error}"
            contenders.pop("torch", None)
    for step in contenders.values():
        dist.barrier()
        step()
    found: dict[str, list[Span]] = {contender: [] for contender in contenders}
    units = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(5):
            time.sleep(SECONDS)
        units.append((time.perf_counter() - start) / 5)
        for contender, step in contenders.items():
            dist.barrier()
            found[contender].append(step())
    print(json.dumps({"spans": found, "units": units, "makespans": makespans, "failed": failed}), flush=True)
    dist.barrier()
    os._exit(0)  # the engines' groups need no orderly end


def cell(name: str, ranks: int, micro_batches: int, repeats: int) -> dict[str, Any]:
    """One schedule at one size: ratios of all contenders."""
    arguments = (name, str(micro_batches), str(repeats))
    answers = run_ranks("benchmarks.pipe.sleeping", ranks, *arguments, timeout_s=1200.0)
    unit = statistics.median(statistics.mean(units) for units in zip(*(a["units"] for a in answers), strict=True))
    result: dict[str, Any] = {"unit_ms": 1e3 * unit, "repeats": repeats}
    if answers[0]["failed"]:
        result["torch failed"] = answers[0]["failed"]
    for contender, makespan in answers[0]["makespans"].items():
        if contender not in answers[0]["spans"]:
            continue
        runs = zip(*(answer["spans"][contender] for answer in answers), strict=True)
        # The clock is the machine's: from the first rank's start to the last one's end.
        seconds = [max(end for _, end in spans) - min(start for start, _ in spans) for spans in runs]
        ratios = [s / makespan / unit for s in seconds]
        result[contender] = {
            "makespan": makespan,
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "seconds": statistics.median(seconds),
        }
    return result


def main() -> None:
    """Measure the cells asked for; keep and print all that were ever measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipe.sleeping", description=__doc__)
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--micro-batches", default=",".join(map(str, MICRO_BATCHES)))
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    path = RESULTS / "sleeping.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for ranks in map(int, options.ranks.split(",")):
        for micro_batches in map(int, options.micro_batches.split(",")):
            for name in options.schedules.split(","):
                key = f"{name} p={ranks} m={micro_batches}"
                cells[key] = cell(name, ranks, micro_batches, options.repeats)
                print(key, {k: v["ratio"] if isinstance(v, dict) else v for k, v in cells[key].items()}, flush=True)
                RESULTS.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n")
                (RESULTS / "sleeping.md").write_text(_table(cells))


def _table(cells: dict[str, Any]) -> str:
    lines = [
        "# Sleeping stages: step time over the simulated makespan",
        "",
        "F, I and W of 20 ms each; median (lowest-highest) ratio of the repeats, contenders in turn in the same "
        "processes; makespan in sleeps of 20 ms. Torch's ratio is over the makespan of its own table.",
        "",
        "| schedule | ranks | micro-batches | penstock | bare loop | torch | makespan | step, s | torch's step, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def place(key: str) -> tuple[int, int, int]:
        name, ranks, micro_batches = key.split()
        return int(ranks[2:]), int(micro_batches[2:]), SCHEDULES.index(name)

    for key in sorted(cells, key=place):
        name, ranks, micro_batches = key.split()
        row = cells[key]
        ratios = [
            f"{row[c]['ratio']:.3f} ({row[c]['low']:.3f}-{row[c]['high']:.3f})" if c in row else ""
            for c in ("penstock", "bare loop", "torch")
        ]
        torch_step = f"{row['torch']['seconds']:.2f}" if "torch" in row else ""
        lines.append(
            f"| {name} | {ranks[2:]} | {micro_batches[2:]} | {' | '.join(ratios)} | {row['penstock']['makespan']:g} | "
            f"{row['penstock']['seconds']:.2f} | {torch_step} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].isdigit():
        _worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
