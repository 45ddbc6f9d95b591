"""The planner: predicted against measured steps, and its choice against a sweep of the others.

- *Models*: six models on two ranks, each in processes of its own. In turn, round by round: the layers are profiled, and
  steps of ``train_batch`` are run with each partition, so that predictions and measurements meet the same machine. The
  planner has chosen in the first round. After two rounds only partitions go on that are near the best.
- *Sleeping*: layers that sleep for given times, on 4 and 8 ranks, where cuts and schedule are chosen
  (:mod:`benchmarks.pipe.planner_sweep`).

::

    python -m benchmarks.pipe.planner                              # everything: about six minutes
    python -m benchmarks.pipe.planner --models tiny,uniform --sleeping ""
    python -m benchmarks.pipe.planner --models "" --sleeping 4
"""

import argparse
import json
import os
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

from benchmarks.pipe import planner_sweep
from benchmarks.pipe.processes import run_ranks
from benchmarks.pipe.sleeping import RESULTS

RANKS, MICRO_BATCHES, ROWS = 2, 8, 4
MODELS = {
    # width, sequence length, vocabulary of the embedding and of the head, kinds of layers between
    "uniform": (192, 64, 256, 256, "mmmmmmmm"),
    # A vocabulary on both sides, of which only the head's computes.
    "heavy head": (96, 64, 8192, 8192, "mmmmmmmmmm"),
    # Half of all parameters are rows of which a batch looks up a few.
    "heavy embedding": (128, 64, 8192, 256, "mmmmmmmm"),
    # Attention computes more than its parameters tell.
    "mixed layers": (96, 384, 256, 256, "aaaaaanmnmnm"),
    "long sequence": (64, 512, 256, 256, "amamam"),
    "tiny": (16, 8, 32, 32, "mmmm"),
}
NEAR = 1.25
"""After two rounds, partitions that take more than this many times the best one's time are left."""
_STEPS = 3


def _module(name: str, bounds: Any) -> Any:
    import torch
    from torch import nn

    from penstock.pipe import LayerSpec, PipelineModule

    width, _, vocabulary, classes, kinds = MODELS[name]

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Any) -> Any:
            return x + self.net(x)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width)

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return x + torch.softmax(q @ k.transpose(1, 2) / width**0.5, dim=-1) @ v

    between = {"m": LayerSpec(Mlp), "a": LayerSpec(Attention), "n": LayerSpec(nn.LayerNorm, width)}
    layers = [
        LayerSpec(nn.Embedding, vocabulary, width),
        *(between[kind] for kind in kinds),
        LayerSpec(nn.Linear, width, classes),
    ]
    return PipelineModule(
        layers,
        num_stages=RANKS,
        partition_method=bounds,
        loss_fn=lambda y, t: nn.functional.cross_entropy(y.flatten(0, 1), t.flatten()),
    )


def _worker(rank: int, name: str, rounds: int) -> None:
    import torch
    import torch.distributed as dist

    import penstock
    from penstock._core.waiting import Watcher
    from penstock.pipe import PipeDataParallelTopology
    from penstock.pipe.groups import PipeGroups
    from penstock.pipe.partition import balance
    from penstock.pipe.planner import plan_bounds, predict
    from penstock.pipe.planner.bounds import all_bounds
    from penstock.pipe.schedule import get_schedule
    from penstock.runtime.config import load_config
    from penstock.runtime.engine_costs import step_overhead
    from penstock.runtime.profiling import Profiler

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    _, length, vocabulary, classes, _ = MODELS[name]
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randint(vocabulary, (ROWS * MICRO_BATCHES, length), generator=generator)
    targets = torch.randint(classes, (ROWS * MICRO_BATCHES, length), generator=generator)
    batches = list(zip(inputs.split(ROWS), targets.split(ROWS), strict=True))
    settings = {
        "pipe": {"stages": RANKS},
        "train": {"global_batch_size": ROWS * MICRO_BATCHES, "micro_batch_size": ROWS, "steps": 1000},
    }
    module = _module(name, "parameters")
    schedule = get_schedule("1f1b", RANKS, MICRO_BATCHES)
    every = list(all_bounds(module.num_layers, RANKS))
    parameters = balance(module.parameter_counts, RANKS)
    engines = {b: penstock.initialize(_module(name, list(b)), settings, optimizer=None) for b in every}
    config = load_config(settings)
    overhead = step_overhead(config)
    seconds: dict[Any, list[list[float]]] = {b: [] for b in every}
    predicted: dict[Any, list[float]] = {b: [] for b in every}
    planned = None

    def step(bounds: Any) -> float:
        dist.barrier()
        start = time.perf_counter()
        engines[bounds].train_batch(iter(batches))
        dist.barrier()
        return time.perf_counter() - start

    with Watcher(rank=rank, deadline_s=120.0) as watcher:
        profiler = Profiler(
            module=module,
            config=config,
            loss_fn=module.loss_fn,
            groups=PipeGroups(PipeDataParallelTopology(RANKS, 1), watcher=watcher),
            device=torch.device("cpu"),
            dtype=torch.float32,
            autocast_dtype=None,
            watcher=watcher,
            overhead=overhead,
        )
        for number in range(rounds):
            profile = profiler.profile(ROWS, batches[0], split=False)
            planned = planned or plan_bounds(profile, schedule)
            for bounds in every:
                predicted[bounds].append(predict(profile, schedule, bounds).seconds)
            medians = {b: statistics.median(s for found in seconds[b] for s in found) for b in every if number}
            for bounds in every:
                if number == 0:
                    step(bounds)  # memory is fresh and connections are made
                # All ranks must leave the same ones: what the first one measured decides.
                near = torch.tensor(number < 2 or medians[bounds] < NEAR * min(medians.values()))
                dist.broadcast(near, 0)
                if bounds in (planned, parameters):
                    seconds[bounds].append([step(bounds) for _ in range(_STEPS)])
                elif near:
                    seconds[bounds].append([step(bounds)])
    rows = [{"bounds": b, "predicted": predicted[b], "measured": seconds[b]} for b in every]
    print(json.dumps({"planned": planned, "parameters": parameters, "rows": rows}), flush=True)
    dist.barrier()
    os._exit(0)  # the engines' groups need no orderly end


def cell(name: str, rounds: int) -> dict[str, Any]:
    """One model: the planned partition, the best of all, and the one by parameters."""
    answer = run_ranks("benchmarks.pipe.planner", RANKS, name, str(rounds), timeout_s=600.0)[0]
    rows = {tuple(row["bounds"]): row for row in answer["rows"]}
    medians = {b: statistics.median(s for found in row["measured"] for s in found) for b, row in rows.items()}
    planned, parameters = tuple(answer["planned"]), tuple(answer["parameters"])
    best = min(medians, key=medians.__getitem__)
    row = rows[planned]
    ratios = [
        predicted / statistics.median(measured)
        for predicted, measured in zip(row["predicted"], row["measured"], strict=True)
    ]
    low, *_, high = statistics.quantiles([s for found in row["measured"] for s in found], n=4)
    return {
        "layers by stage": [b - a for a, b in pairwise(planned)],
        "predicted_ms": 1e3 * statistics.median(row["predicted"]),
        "measured_ms": 1e3 * medians[planned],
        "spread": (high - low) / medians[planned],
        "predicted_over_measured": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "planned_over_best": medians[planned] / medians[best],
        "best": best,
        "partitions": len(rows),
        "parameters_over_planned": medians[parameters] / medians[planned],
        "parameters": parameters,
        "rounds": rounds,
    }


def main() -> None:
    """Measure what is asked for; keep and print all that was ever measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipe.planner", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="names, or nothing for none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sleeping", default=",".join(planner_sweep.SIZES), help="ranks: 4, 8, or nothing for none")
    options = parser.parse_args()
    path = RESULTS / "planner.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in filter(None, [*options.models.split(","), *options.sleeping.split(",")]):
        found = cell(name, options.rounds) if name in MODELS else planner_sweep.cell(int(name))
        cells[name if name in MODELS else f"sleeping p={name}"] = found
        print(name, found, flush=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n")
        (RESULTS / "planner.md").write_text(_table(cells) + planner_sweep.table(cells))


def _table(cells: dict[str, Any]) -> str:
    lines = [
        "# The planner: predicted and measured steps",
        "",
        f"{RANKS} ranks, 1F1B, {MICRO_BATCHES} micro-batches of {ROWS} rows. Round by round the layers are profiled "
        "and steps of `train_batch` with every partition take turns in the same processes; after two rounds only those "
        f"within {NEAR:g} of the best go on. Medians over the rounds; of the ratio also the lowest and the highest "
        "round; the spread is between quartiles of the measured steps.",
        "",
        "| model | layers by stage | predicted, ms | measured, ms | spread | predicted / measured | partitions |"
        " planned / best | by parameters / planned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        if name in cells:
            row = cells[name]
            lines.append(
                f"| {name} | {', '.join(map(str, row['layers by stage']))} | {row['predicted_ms']:.1f} | "
                f"{row['measured_ms']:.1f} | {100 * row['spread']:.0f} % | {row['predicted_over_measured']:.2f} "
                f"({row['ratio_low']:.2f}-{row['ratio_high']:.2f}) | {row['partitions']} | "
                f"{row['planned_over_best']:.3f} | {row['parameters_over_planned']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].isdigit():
        _worker(int(sys.argv[1]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
