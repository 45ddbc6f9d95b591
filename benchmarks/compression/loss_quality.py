"""Loss against bytes: every way to talk less, beside uncompressed AdamW, on the reference GPT and real text.

Two replicas on this machine, the demo's corpus of Python sources, equal steps and data; seeds are paired: a seed
decides initial weights and order, whatever the method. The loss is that of the held-out text after the last step, on
the weights that all replicas agree on; bytes are what a replica sends per step, on average over the whole run, warm-up
included. Finished cells are kept in the results file, and a run goes on with those that are missing::

    python -m benchmarks.compression.loss_quality            # an hour on two quiet cores
    python -m benchmarks.compression.loss_quality --seeds 1 --steps 40 --results /tmp/try    # a look
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from penstock._core.files import atomic_file
from penstock.compression import known_algorithms

STEPS, SEEDS, REPLICAS, LENGTH = 240, (1, 2, 3), 2, 64
MODEL: Final = {"num_layers": 2, "hidden_size": 96, "num_heads": 4}
RESULTS: Final = Path(__file__).parents[1] / "results" / "compression"
BASELINE: Final = "AdamW"
PERIOD: Final = 10
"""Steps between exchanges of the methods that train apart."""


def _gradients(algorithm: str, **options: Any) -> dict[str, Any]:
    return {"compression": {"algorithm": algorithm, "options": options}}


def _apart(method: str, **keys: Any) -> dict[str, Any]:
    return {"local_updates": {"method": method, "period": PERIOD, **keys}}


def _owner(name: str, **keys: Any) -> dict[str, Any]:
    return {"optimizer": {"name": name, **keys}}


def methods(steps: int) -> dict[str, dict[str, Any]]:
    """What each method changes in the baseline's configuration."""
    freeze = steps // 5
    zero_one = {"var_freeze_step": freeze, "var_update_scaler": 8, "local_step_scaler": steps // 6}
    muon = {"name": "muon"}
    slow = {"outer_momentum": 0.5}  # a run this short has too few exchanges for the paper's 0.9, which stands beside it
    return {
        BASELINE: {},
        **{f"AdamW, gradients {name}": _gradients(name) for name in known_algorithms() if name != "none"},
        "1-bit Adam": _owner("onebit_adam", freeze_step=freeze),
        "0/1 Adam": _owner("zero_one_adam", options=zero_one),
        "1-bit LAMB": _owner("onebit_lamb", freeze_step=freeze, lr=1e-2),
        "DeMo": _owner("demo", lr=1e-3),
        "local SGD (AdamW inside)": _apart("local_sgd"),
        "DiLoCo, outer momentum 0.9": _apart("diloco"),
        "DiLoCo": _apart("diloco", **slow),
        "DiLoCo int8": _apart("diloco", algorithm="int8", **slow),
        "Streaming DiLoCo int4": _apart("streaming_diloco", algorithm="int4", fragments=3, **slow),
        "SparseLoCo": _apart("sparseloco"),
        "Muon": {"optimizer": muon},
        "MuLoCo int2": {**_apart("muloco"), "optimizer": muon},
    }


def worker(cell: dict[str, Any]) -> None:
    """One replica of one cell; the first prints what came out."""
    import torch

    import penstock
    from penstock._core.meter import REPLICAS as REPLICA_BYTES
    from penstock.models.gpt import GPTConfig, gpt_layers, gpt_loss
    from penstock.pipe.module import PipelineModule
    from penstock.runtime.config import load_config
    from penstock.runtime.evaluation import heldout_loss, heldout_windows

    torch.set_num_threads(1)
    steps, seed, corpus = cell["steps"], cell["seed"], Path(cell["corpus"])
    changes = methods(steps)[cell["method"]]
    base: dict[str, Any] = {
        "seed": seed,
        "deadline_s": 120,
        "data_parallel": {"replicas": REPLICAS},
        "train": {"global_batch_size": 16, "micro_batch_size": 8, "steps": steps, "eval_batches": 24},
        "data": {"train": str(corpus / "train"), "heldout": str(corpus / "heldout"), "sequence_length": LENGTH},
        "schedule": {"warmup_steps": max(1, steps // 12), "decay": "cosine", "min_ratio": 0.1},
    }
    config = load_config({**base, **changes, "optimizer": {"lr": 1e-3, **changes.get("optimizer", {})}})
    shape = GPTConfig(vocab_size=cell["vocab_size"], context_length=LENGTH, **MODEL)
    model = PipelineModule(gpt_layers(shape), loss_fn=gpt_loss, base_seed=seed)
    windows = heldout_windows(config)
    with penstock.initialize(model, config) as engine:
        curve = [engine.train_batch() for _ in range(steps)]
        parts = engine.parts
        if parts.local_updates is not None and parts.local_updates.schedule.fragments > 1:
            parts.local_updates.synchronize()  # fragments were last exchanged at different steps
        sent = parts.meter.sent[REPLICA_BYTES] / steps
        loss, _ = heldout_loss(engine, windows)
        if engine.rank == 0:
            numel = sum(p.numel() for p in engine.stage.parameters())
            print(
                json.dumps({"loss": loss, "bytes": sent, "parameters": numel, "curve": curve[:: max(1, steps // 40)]})
            )


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Both replicas of a cell, in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(REPLICAS):
        env = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(REPLICAS),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "benchmarks.compression.loss_quality", "--cell", json.dumps(cell)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{cell['method']}, seed {cell['seed']} failed")
    answer: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return answer


def table(cells: dict[str, Any], seeds: list[int], steps: int) -> list[str]:
    """The results as Markdown."""
    first = next(iter(cells.values()))
    lines = [
        "# Loss against bytes, beside uncompressed AdamW",
        "",
        f"Reference GPT, {first['parameters']:,} parameters, {REPLICAS} replicas, {steps} steps of 16 x {LENGTH}",
        f"tokens of Python sources, paired seeds: {len(seeds)}. Held-out loss in nats per token; the gap is to AdamW",
        "with the same seed, the spread the gaps' standard deviation. Bytes: sent by a replica per step, on average.",
        f"Methods that train apart exchange every {PERIOD} steps.",
        "",
        "| method | bytes per step | of AdamW's | held-out loss | gap | spread |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['method']} | {row['bytes']:,.0f} | 1/{1 / row['share']:.3g} | {row['loss']:.4f} | "
        f"{row['gap']:+.4f} | {row['spread']:.4f} |"
        for row in rows(cells, seeds)
    ]
    return lines


def rows(cells: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
    """Each method's mean bytes, loss and paired gap, over the seeds for which it and the baseline are there."""
    result = []
    for method in dict.fromkeys(key.rpartition("/")[0] for key in cells):
        pairs = [
            (cells[f"{method}/{seed}"], cells[f"{BASELINE}/{seed}"])
            for seed in seeds
            if f"{method}/{seed}" in cells and f"{BASELINE}/{seed}" in cells
        ]
        if not pairs:
            continue
        gaps = [mine["loss"] - base["loss"] for mine, base in pairs]
        sent = statistics.mean(mine["bytes"] for mine, _ in pairs)
        result.append(
            {
                "method": method,
                "bytes": sent,
                "share": sent / statistics.mean(base["bytes"] for _, base in pairs),
                "loss": statistics.mean(mine["loss"] for mine, _ in pairs),
                "gap": statistics.mean(gaps),
                "spread": statistics.stdev(gaps) if len(gaps) > 1 else 0.0,
            }
        )
    return result


def draw(cells: dict[str, Any], seeds: list[int], path: Path) -> None:
    """The picture: gap against bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "penstock"  # the same bytes for the same numbers
    figure, axes = plt.subplots(figsize=(8, 5))
    for row in rows(cells, seeds):
        axes.errorbar(row["bytes"], row["gap"], yerr=row["spread"], fmt="o", capsize=3)
        axes.annotate(row["method"], (row["bytes"], row["gap"]), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("bytes sent by a replica per step")
    axes.set_ylabel("held-out loss minus AdamW's (nats per token)")
    axes.set_title("Loss against bytes at equal steps")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Run the cells that are missing and write ``results/compression/loss_quality.{json,md,svg}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", help="run one replica of one cell (used by the program itself)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", help="names of methods, besides AdamW")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "penstock-demo-corpus")
    options = parser.parse_args()
    if options.cell:
        worker(json.loads(options.cell))
        return
    from penstock.runtime.demo import VOCAB_SIZE, prepare_corpus

    prepare_corpus(options.corpus, print)
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "loss_quality.json"
    recipe = {"steps": options.steps, "length": LENGTH, "model": MODEL, "period": PERIOD}
    stored = json.loads(file.read_text()) if file.exists() else {}
    cells: dict[str, Any] = stored.get("cells", {}) if stored.get("recipe") == recipe else {}
    wanted = methods(options.steps)
    names = [name for name in wanted if options.only is None or name in options.only or name == BASELINE]
    for seed in options.seeds:
        for method in names:
            key, changes = f"{method}/{seed}", json.loads(json.dumps(wanted[method]))
            if cells.get(key, {}).get("changes") == changes:
                continue
            cell = {"method": method, "seed": seed, "steps": options.steps, "corpus": str(options.corpus)}
            cells[key] = {"changes": changes, **run_cell({**cell, "vocab_size": VOCAB_SIZE})}
            print(f"{key}: held-out loss {cells[key]['loss']:.4f}, {cells[key]['bytes']:,.0f} bytes a step", flush=True)
            with atomic_file(file) as out:
                out.write((json.dumps({"recipe": recipe, "cells": cells}, indent=1) + "\n").encode())
    lines = table(cells, options.seeds, options.steps)
    (options.results / "loss_quality.md").write_text("\n".join(lines) + "\n")
    draw(cells, options.seeds, options.results / "loss_quality.svg")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
