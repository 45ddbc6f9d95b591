"""Planned against measured steps of six models, and the planned cuts against balanced parameters.

Each model runs on two ranks in one go: the layers are profiled, then steps with each partition take turns. Run as
``python -m benchmarks.pipe.planner``; it takes about three minutes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

from benchmarks.pipe.processes import run_ranks
from benchmarks.pipe.sleeping import RESULTS

RANKS, MICRO_BATCHES, ROWS = 2, 8, 4
MODELS = {
    # width, sequence length, vocabulary of the embedding and of the head, kinds of layers between
    "uniform": (256, 64, 256, 256, "mmmmmmmm"),
    "heavy head": (128, 64, 256, 16384, "mmmmmmmm"),
    "heavy embedding": (128, 32, 60000, 256, "mmmmmmmm"),
    "mixed layers": (192, 96, 256, 256, "aamnnmaamnnm"),
    "long sequence": (64, 768, 256, 256, "amamam"),
    "tiny": (16, 8, 32, 32, "mmmm"),
}


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


def _worker(rank: int, name: str, repeats: int) -> None:
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
    from penstock.runtime.profiling import Profiler

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    _, length, vocabulary, classes, _ = MODELS[name]
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randint(vocabulary, (ROWS * MICRO_BATCHES, length), generator=generator)
    targets = torch.randint(classes, (ROWS * MICRO_BATCHES, length), generator=generator)
    settings = {
        "pipe": {"stages": RANKS},
        "train": {"global_batch_size": ROWS * MICRO_BATCHES, "micro_batch_size": ROWS, "steps": 1000},
    }
    config = load_config(settings)
    module = _module(name, "parameters")
    with Watcher(rank=rank, deadline_s=120.0) as watcher:
        groups = PipeGroups(PipeDataParallelTopology(RANKS, 1), watcher=watcher)
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
        profile = profiler.profile(ROWS, (inputs[:ROWS], targets[:ROWS]))
        groups.close()
    schedule = get_schedule("1f1b", RANKS, MICRO_BATCHES)
    planned = plan_bounds(profile, schedule)
    every = list(all_bounds(module.num_layers, RANKS))
    parameters = balance(module.parameter_counts, RANKS)
    engines = {b: penstock.initialize(_module(name, list(b)), settings, optimizer=None) for b in every}
    batches = list(zip(inputs.split(ROWS), targets.split(ROWS), strict=True))
    seconds: dict[Any, list[float]] = {b: [] for b in every}
    for number in range(repeats + 1):
        for bounds, engine in engines.items():
            dist.barrier()
            start = time.perf_counter()
            engine.train_batch(iter(batches))
            dist.barrier()
            if number:  # the first one warms up
                seconds[bounds].append(time.perf_counter() - start)
    found = {
        "planned": planned,
        "parameters": parameters,
        "rows": [
            {"bounds": b, "predicted": predict(profile, schedule, b).seconds, "measured": seconds[b]} for b in every
        ],
    }
    print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # the engines' groups need no orderly end


def cell(name: str, repeats: int) -> dict[str, Any]:
    """One model: the planned partition, the best of all, and the one by parameters."""
    answer = run_ranks("benchmarks.pipe.planner", RANKS, name, str(repeats), timeout_s=600.0)[0]
    rows = {tuple(row["bounds"]): row for row in answer["rows"]}
    medians = {bounds: statistics.median(row["measured"]) for bounds, row in rows.items()}
    planned, parameters = tuple(answer["planned"]), tuple(answer["parameters"])
    best = min(medians, key=medians.__getitem__)
    low, *_, high = statistics.quantiles(rows[planned]["measured"], n=4)
    return {
        "layers by stage": [b - a for a, b in pairwise(planned)],
        "predicted_ms": 1e3 * rows[planned]["predicted"],
        "measured_ms": 1e3 * medians[planned],
        "spread": (high - low) / medians[planned],
        "predicted_over_measured": rows[planned]["predicted"] / medians[planned],
        "planned_over_best": medians[planned] / medians[best],
        "best": best,
        "parameters_over_planned": medians[parameters] / medians[planned],
        "parameters": parameters,
        "repeats": repeats,
    }


def main() -> None:
    """Measure the models asked for; keep and print all that were ever measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipe.planner", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    path = RESULTS / "planner.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.models.split(","):
        cells[name] = cell(name, options.repeats)
        print(name, cells[name], flush=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n")
        (RESULTS / "planner.md").write_text(_table(cells))


def _table(cells: dict[str, Any]) -> str:
    lines = [
        "# The planner: predicted and measured steps",
        "",
        f"{RANKS} ranks, 1F1B, {MICRO_BATCHES} micro-batches of {ROWS} rows. Steps of `train_batch` with every "
        "partition take turns in the same processes; medians of the repeats, spread between quartiles.",
        "",
        "| model | layers by stage | predicted, ms | measured, ms | spread | predicted / measured | planned / best |"
        " by parameters / planned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        if name in cells:
            row = cells[name]
            lines.append(
                f"| {name} | {', '.join(map(str, row['layers by stage']))} | {row['predicted_ms']:.1f} | "
                f"{row['measured_ms']:.1f} | {100 * row['spread']:.0f} % | {row['predicted_over_measured']:.2f} | "
                f"{row['planned_over_best']:.3f} | {row['parameters_over_planned']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].isdigit():
        _worker(int(sys.argv[1]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
