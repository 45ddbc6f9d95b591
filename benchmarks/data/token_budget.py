"""Batches of a token budget: time, padding and dropped samples by number of samples::

python -m benchmarks.data.token_budget [--sizes 500 1000 2000 10000000]

Lengths are drawn from a log-normal distribution clipped to 1..2048 (mean about 360 tokens), the budget of a
micro-batch is 16,384 tokens, a step has 8 micro-batches. DeepSpeed's ``batch_by_seqlens``, where it is installed,
batches the same lengths sorted by length, up to a size that it gets through in seconds. Both times include everything
from the lengths to the samples of every micro-batch.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.data._results import shown, spread, write_results
from penstock.data_pipeline.data_sampling.order import ShuffledOrder
from penstock.data_pipeline.data_sampling.token_budget import TokenBudget, TokenBudgetConfig

BUDGET = 16_384
MICRO_BATCHES = 8
RUNS = 5
PEER_LIMIT = 2_000


def lengths_of(count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Lengths of documents: most short, a few long."""
    drawn = np.random.default_rng(0).lognormal(5.5, 0.9, count)
    return np.clip(drawn, 1, 2048).astype(np.int32)


def penstock(lengths: np.ndarray[Any, np.dtype[np.int32]]) -> dict[str, float]:
    """One epoch in Penstock."""
    count = len(lengths)
    start = time.perf_counter()
    order = ShuffledOrder(count, 1)
    budget = TokenBudget(lengths, order, count, MICRO_BATCHES, 1, TokenBudgetConfig(max_tokens=BUDGET))
    steps, tokens, padded = budget.summary(0, count)
    samples = order(budget.positions(0, count))
    seconds = time.perf_counter() - start
    kept = int(np.count_nonzero(np.bincount(samples, minlength=count)))
    return {"seconds": seconds, "padding": 1 - tokens / padded, "dropped": count - kept, "steps": steps}


def deepspeed(lengths: np.ndarray[Any, np.dtype[np.int32]]) -> dict[str, float]:
    """The same lengths through DeepSpeed's function."""
    from deepspeed.runtime.data_pipeline.data_sampling.variable_batch_size_and_lr import batch_by_seqlens

    start = time.perf_counter()
    micro_batches, sizes, _ = batch_by_seqlens(
        lengths.tolist(), BUDGET, sequence_picking_order="seqlen", effective_batch_size=MICRO_BATCHES
    )
    seconds = time.perf_counter() - start
    rows = [lengths[ids] for _, ids in micro_batches]
    padded = sum(len(row) * int(row.max()) for row in rows)
    tokens = sum(int(row.sum()) for row in rows)
    dropped = len(lengths) - sum(len(row) for row in rows)
    return {"seconds": seconds, "padding": 1 - tokens / padded, "dropped": dropped, "steps": len(sizes)}


def main() -> None:
    """Measure and write ``results/data/token_budget``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000, 10_000_000])
    sizes = parser.parse_args().sizes
    try:
        import deepspeed as installed

        peer = f"DeepSpeed {installed.__version__}"
    except ImportError:
        peer = ""
        print("deepspeed is not installed here: its rows are left out")
    results = []
    for count in sizes:
        lengths = lengths_of(count)
        contenders = {"penstock": penstock}
        if peer and count <= PEER_LIMIT:
            contenders["deepspeed"] = deepspeed
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(RUNS):
            for name, contender in contenders.items():
                runs[name].append(contender(lengths))
        for name, found in runs.items():
            seconds = [run["seconds"] for run in found]
            facts = {key: statistics.median(run[key] for run in found) for key in ("padding", "dropped", "steps")}
            results.append({"samples": count, "batching": name, "seconds": spread(seconds), "runs": seconds, **facts})
    lines = [
        f"# Micro-batches of {BUDGET:,} tokens, {MICRO_BATCHES} a step, medians of {RUNS} runs in turn",
        "",
        f"{peer or 'DeepSpeed was not installed'}; it was asked up to {PEER_LIMIT:,} samples.",
        "",
        "| samples | batching | seconds | padding | samples dropped | steps |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['samples']:,} | {row['batching']} | {shown(row['runs'], 3)} | {100 * row['padding']:.3f} % | "
        f"{row['dropped']:,.0f} | {row['steps']:,.0f} |"
        for row in results
    ]
    write_results("token_budget", {"peer": peer or None, "results": results}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
