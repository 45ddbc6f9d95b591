"""The planner's choice of cuts and schedule for layers that sleep, against a sweep of cuts and schedules.

Layers sleep for given times forward, for the gradient of their input and for that of their weight, so any number of
ranks fit on one machine. The planner profiles them as any others and chooses; then steps of every combination are run
once (on 8 ranks, of a fixed sample of the cuts), and the fastest ones and the choice several times, in turn. Run by
``python -m benchmarks.pipe.planner``.
"""

import json
import os
import random
import statistics
import sys
import time
from typing import Any

from benchmarks.pipe.processes import run_ranks

SIZES = {
    # ranks: milliseconds of F, I and W of each layer
    "4": ((2, 0, 6), (4, 4, 4), (8, 6, 4), (3, 5, 3), (3, 5, 3), (6, 3, 6), (2, 2, 2), (4, 4, 4), (9, 12, 6)),
    "8": (
        *((2, 0, 6), (4, 4, 4), (8, 6, 4), (3, 5, 3), (3, 5, 3), (6, 3, 6)),
        *((2, 2, 2), (4, 4, 4), (5, 5, 5), (4, 6, 3), (4, 4, 4), (9, 12, 6)),
    ),
}
SCHEDULES = ("1f1b", "zb_h1", "zb_v")
MICRO_BATCHES = 8
MOST_CUTS = 60
"""Of more divisions than these, a sample of so many is run."""
_BEST, _REPEATS = 6, 5


def _module(times: Any, bounds: Any) -> Any:
    import torch
    from torch import nn
    from torch.nn.functional import mse_loss

    from penstock.pipe import LayerSpec, PipelineModule

    class SleepBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, seconds: float) -> Any:
            ctx.seconds = seconds
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            time.sleep(ctx.seconds)
            return gradients[0], None

    class Sleeper(nn.Module):
        def __init__(self, f: float, i: float, w: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8))
            self.f, self.i, self.w = 1e-3 * f, 1e-3 * i, 1e-3 * w

        def forward(self, x: Any) -> Any:
            time.sleep(self.f)
            return SleepBackward.apply(x, self.i) + SleepBackward.apply(self.weight, self.w)

    return PipelineModule(
        [LayerSpec(Sleeper, *layer) for layer in times],
        num_stages=len(bounds) - 1,
        partition_method=list(bounds),
        loss_fn=mse_loss,
    )


def _candidates(ranks: int, layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Every schedule with every division, or with a sample of them."""
    from penstock.pipe.planner.bounds import all_bounds
    from penstock.pipe.schedule import SCHEDULES as KNOWN

    found = []
    for name in SCHEDULES:
        stages = ranks * KNOWN[name].chunks
        if stages <= layers:
            every = list(all_bounds(layers, stages))
            cuts = every if len(every) <= MOST_CUTS else random.Random(7).sample(every, MOST_CUTS)
            found += [(name, bounds) for bounds in cuts]
    return found


def _worker(rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist

    from penstock._core.waiting import Watcher
    from penstock.compression import LocalGradients
    from penstock.pipe import MicroBatch, PipeDataParallelTopology
    from penstock.pipe.engine import PipelineEngine
    from penstock.pipe.groups import PipeGroups
    from penstock.pipe.planner import plan
    from penstock.pipe.schedule import get_schedule
    from penstock.runtime.config import load_config
    from penstock.runtime.profiling import Profiler

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    times = SIZES[str(ranks)]
    row = torch.ones(1, 8)
    config = load_config(
        {
            "pipe": {"stages": ranks},
            "train": {"global_batch_size": MICRO_BATCHES, "micro_batch_size": 1, "steps": 10},
        }
    )
    with Watcher(rank=rank, deadline_s=60.0) as watcher:
        groups = PipeGroups(PipeDataParallelTopology(ranks, 1), watcher=watcher)
        module = _module(times, [0, *range(len(times) - ranks + 1, len(times) + 1)])
        profiler = Profiler(
            module=module,
            config=config,
            loss_fn=module.loss_fn,
            groups=groups,
            device=torch.device("cpu"),
            dtype=torch.float32,
            autocast_dtype=None,
            watcher=watcher,
        )
        profile = profiler.profile(1, (row, row))
        choice = plan([profile], ranks=ranks, samples=MICRO_BATCHES, schedules=SCHEDULES, intervals=(0,)).best
        chosen = (choice.schedule.name, choice.bounds)
        engines: dict[Any, PipelineEngine] = {}
        found: dict[Any, list[float]] = {}

        def step(candidate: Any) -> None:
            name, bounds = candidate
            if candidate not in engines:
                schedule = get_schedule(name, ranks, MICRO_BATCHES)
                stages = [_module(times, bounds).build_stage(stage) for stage in schedule.stages_of(rank)]
                engines[candidate] = PipelineEngine(
                    stages,
                    schedule=schedule,
                    micro_batches=MICRO_BATCHES,
                    groups=groups,
                    exchange=LocalGradients([p for stage in stages for p in stage.parameters()], replicas=1),
                    loss_fn=module.loss_fn,
                    watcher=watcher,
                )
            dist.barrier()
            start = time.perf_counter()
            engines[candidate].train_step(batches, step=0)
            dist.barrier()
            found.setdefault(candidate, []).append(time.perf_counter() - start)

        batches = [MicroBatch(row, row, index) for index in range(MICRO_BATCHES)]
        candidates = _candidates(ranks, len(times))
        for candidate in dict.fromkeys([*candidates, chosen]):
            step(candidate)
        order = sorted(found, key=lambda candidate: found[candidate][0])
        picked = torch.tensor([candidates.index(c) for c in order if c in candidates][:_BEST])
        dist.broadcast(picked, 0)
        for _ in range(_REPEATS):
            for candidate in dict.fromkeys([chosen, *(candidates[at] for at in picked.tolist())]):
                step(candidate)
    rows = [[*candidate, seconds] for candidate, seconds in found.items()]
    print(json.dumps({"chosen": chosen, "predicted": choice.seconds, "rows": rows}), flush=True)
    dist.barrier()
    os._exit(0)  # the engines' groups need no orderly end


def cell(ranks: int) -> dict[str, Any]:
    """The choice beside the best of the sweep; the first step of each, which the sweep is made of, does not count."""
    from penstock.pipe.planner.bounds import all_bounds
    from penstock.pipe.schedule import SCHEDULES as KNOWN

    answer = run_ranks("benchmarks.pipe.planner_sweep", ranks, timeout_s=600.0)[0]
    layers = len(SIZES[str(ranks)])
    runs = {(name, tuple(bounds)): seconds for name, bounds, seconds in answer["rows"]}
    repeated = {candidate: seconds[1:] for candidate, seconds in runs.items() if len(seconds) > 1}
    medians = {candidate: statistics.median(seconds) for candidate, seconds in repeated.items()}
    chosen = (answer["chosen"][0], tuple(answer["chosen"][1]))
    best = min(medians, key=medians.__getitem__)
    low, *_, high = statistics.quantiles(repeated[chosen], n=4)
    return {
        "schedule": chosen[0],
        "bounds": chosen[1],
        "predicted_ms": 1e3 * answer["predicted"],
        "measured_ms": 1e3 * medians[chosen],
        "spread": (high - low) / medians[chosen],
        "predicted_over_measured": answer["predicted"] / medians[chosen],
        "best": best,
        "best_ms": 1e3 * medians[best],
        "chosen_over_best": medians[chosen] / medians[best],
        "median of all, ms": 1e3 * statistics.median(seconds[0] for seconds in runs.values()),
        "run": len(runs),
        "of": sum(len(list(all_bounds(layers, ranks * KNOWN[n].chunks))) for n in SCHEDULES),
        "repeats": _REPEATS,
    }


def table(cells: dict[str, Any]) -> str:
    """The cells of the sweep, of all that were measured."""
    lines = [
        "",
        "# The planner's choice among cuts and schedules, layers that sleep",
        "",
        f"Cuts and one of {', '.join(SCHEDULES)}; {MICRO_BATCHES} micro-batches. Every combination (of more than "
        f"{MOST_CUTS} divisions a fixed sample of as many) is run once, the best {_BEST} and the choice "
        f"{_REPEATS} times more, in turn: medians, and the spread between quartiles of the choice.",
        "",
        "| ranks | layers | combinations run | choice | predicted, ms | measured, ms | spread | predicted / measured |"
        " best of the sweep, ms | choice / best | median combination, ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in SIZES:
        row = cells.get(f"sleeping p={ranks}")
        if row is not None:
            bounds = ", ".join(map(str, row["bounds"]))
            lines.append(
                f"| {ranks} | {len(SIZES[ranks])} | {row['run']} of {row['of']} | {row['schedule']}: {bounds} | "
                f"{row['predicted_ms']:.1f} | {row['measured_ms']:.1f} | {100 * row['spread']:.1f} % | "
                f"{row['predicted_over_measured']:.2f} | {row['best_ms']:.1f} | {row['chosen_over_best']:.3f} | "
                f"{row['median of all, ms']:.1f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    _worker(int(sys.argv[1]), int(sys.argv[2]))
