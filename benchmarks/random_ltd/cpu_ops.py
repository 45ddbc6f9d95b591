"""Sampling, gather, scatter and the fused unit on the CPU, beside torch's own ways and plain copies in the same run.

Batch 8, sequence 2,048, hidden 1,024 in float32, keep 1,024; one thread and two; in memory that is fresh for every
result (glibc's default gives large blocks back and maps new ones) and in memory that is used again (the allocator
settings of ``penstock train``). A forward time includes building autograd's graph. The contenders come in another
order in each round: what ran before leaves its own lines in the caches and threads that still wait for work. About a
minute on an idle machine::

    python -m benchmarks.random_ltd.cpu_ops
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.random_ltd._results import REUSE, write_results

BATCH, LENGTH, WIDTH, KEPT = 8, 2048, 1024, 1024
ROUNDS = 10
SAMPLES = 20
COPY, HUGE = "plain copy", "plain copy, huge pages"


def contenders() -> dict[str, dict[str, Callable[[], Any]]]:
    """By operation, what does it: ours, torch's ways, and a plain copy of the result."""
    import torch

    from penstock.data_pipeline.random_ltd import GatherTokens, ScatterTokens, gpt_sample_tokens
    from penstock.data_pipeline.random_ltd.kernels.cpu import _fresh
    from penstock.data_pipeline.random_ltd.token_ops import dropped_layer

    torch.manual_seed(0)
    Tensor = torch.Tensor
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    y = torch.randn(BATCH, KEPT, WIDTH, requires_grad=True)
    g, g_kept = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, KEPT, WIDTH)
    x_plain, y_plain = x.detach(), y.detach()
    indices = gpt_sample_tokens(KEPT, LENGTH, BATCH, key=1)[0][0]
    at = indices.long()
    row = torch.arange(BATCH)[:, None]
    flat = (row * LENGTH + at).flatten()
    wide = at[:, :, None].expand(-1, -1, WIDTH)

    gathers: dict[str, Callable[[Tensor], Tensor]] = {
        "penstock": lambda x: GatherTokens.apply(x, indices, True)[1],
        "expand + gather": lambda x: x.gather(1, wide),
        "fancy index": lambda x: x[row, at],
        "index_select": lambda x: x.flatten(0, 1).index_select(0, flat).view(BATCH, KEPT, WIDTH),
    }
    scatters: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "penstock": lambda x, y: ScatterTokens.apply(x, y, indices, True),
        "clone + scatter": lambda x, y: x.clone().scatter_(1, wide, y),
        "clone + fancy index": lambda x, y: x.clone().index_put_((row, at), y),
        "clone + index_copy": lambda x, y: (
            x.clone().flatten(0, 1).index_copy_(0, flat, y.flatten(0, 1)).view(BATCH, LENGTH, WIDTH)
        ),
    }

    def copy(*tensors: Tensor) -> list[Tensor]:
        return [torch.empty_like(one).copy_(one) for one in tensors]

    def copy_huge(*tensors: Tensor) -> list[Tensor]:
        return [_fresh(one.shape, one.dtype).copy_(one) for one in tensors]

    def pair(x: Tensor) -> Tensor:
        handed_on, kept = GatherTokens.apply(x, indices, True)
        return ScatterTokens.apply(handed_on, kept, indices, True)

    units: dict[str, Callable[[Tensor], Tensor]] = {
        "penstock": lambda x: dropped_layer(lambda kept: kept, x, indices),
        "penstock, gather + layer + scatter": pair,
        **{
            f"{one} + layer + {other}": lambda x, one=one, other=other: scatters[other](x, gathers[one](x))
            for one, other in zip(list(gathers)[1:], list(scatters)[1:], strict=True)
        },
    }

    sampling = {
        "penstock": lambda: gpt_sample_tokens(KEPT, LENGTH, BATCH, key=1),
        "multinomial + sort": lambda: torch.multinomial(torch.ones(BATCH, LENGTH), KEPT).sort(dim=1).values.int(),
    }

    def backward(graph: Tensor, inputs: list[Tensor], g: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(graph, inputs, g, retain_graph=True)

    def both_ways(unit: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(unit(x), [x], g)

    # What the operation writes, forward and backward, for the plain copies.
    writes = {
        "gather": [y_plain],
        "gather, backward": [x_plain],
        "scatter": [x_plain],
        "scatter, backward": [x_plain, y_plain],
        "unit, forward": [y_plain, x_plain],
        "unit, both ways": [y_plain, x_plain, y_plain, x_plain],
    }
    timed: dict[str, dict[str, Callable[[], Any]]] = {
        # Once, after operations that fill the caches; and many times in a row.
        "sampling, cold": sampling,
        f"sampling, {SAMPLES} times": {name: lambda f=f: [f() for _ in range(SAMPLES)] for name, f in sampling.items()},
        "gather": {name: lambda f=f: f(x) for name, f in gathers.items()},
        "gather, backward": {name: backward(f(x), [x], g_kept) for name, f in gathers.items()},
        "scatter": {name: lambda f=f: f(x, y) for name, f in scatters.items()},
        "scatter, backward": {name: backward(f(x, y), [x, y], g) for name, f in scatters.items()},
        "unit, forward": {name: lambda f=f: f(x) for name, f in units.items()},
        "unit, both ways": {name: both_ways(f) for name, f in units.items()},
    }
    for operation, written in writes.items():
        timed[operation][COPY] = lambda written=written: copy(*written)
        timed[operation][HUGE] = lambda written=written: copy_huge(*written)
    return timed


def child(threads: int) -> None:
    """Time everything ROUNDS times, each operation's contenders in another order; print milliseconds."""
    import torch

    torch.set_num_threads(threads)
    timed = contenders()
    times: dict[str, dict[str, list[float]]] = {
        operation: {name: [] for name in ways} for operation, ways in timed.items()
    }
    order = random.Random(0)
    for _ in range(ROUNDS):
        for operation, ways in timed.items():
            for name in order.sample(list(ways), len(ways)):
                begin = time.perf_counter()
                result = ways[name]()
                times[operation][name].append((time.perf_counter() - begin) * 1e3)
                del result
    print(json.dumps(times))


def measure(threads: int, memory: str) -> dict[str, dict[str, dict[str, float]]]:
    """Medians and quartiles in milliseconds of a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), **(REUSE if memory == "reused" else {})}
    command = [sys.executable, "-m", "benchmarks.random_ltd.cpu_ops", str(threads)]
    out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {
        operation: {
            name: dict(zip(("low", "median", "high"), statistics.quantiles(values[1:], n=4), strict=True))
            for name, values in ways.items()
        }
        for operation, ways in json.loads(out.splitlines()[-1]).items()
    }


def table(figures: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """One line for each operation."""
    lines = [
        "| operation | penstock, ms (quartiles) | of the copy | of the copy in huge pages | torch, best, ms | × faster "
        "| others, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for operation, ways in figures.items():
        ours = ways["penstock"]
        median = {name: one["median"] for name, one in ways.items()}
        torchs = {n: ms for n, ms in median.items() if not n.startswith(("penstock", "plain"))}
        best = min(torchs, key=lambda name: torchs[name])
        copies = [f"{median['penstock'] / median[name]:.2f}" if name in median else "" for name in (COPY, HUGE)]
        others = "; ".join(
            f"{name} {ms:.2f}" for name, ms in median.items() if name != best and name not in (COPY, HUGE, "penstock")
        )
        lines.append(
            f"| {operation} | {ours['median']:.2f} ({ours['low']:.2f} to {ours['high']:.2f}) | {' | '.join(copies)} "
            f"| {best} {torchs[best]:.2f} | {torchs[best] / median['penstock']:.1f} | {others} |"
        )
    return lines


def main() -> None:
    """Measure and write ``results/random_ltd/cpu_ops.{json,md}``."""
    runs = {
        f"{threads} thread{'s' * (threads > 1)}, {memory} memory": measure(threads, memory)
        for threads in (1, 2)
        for memory in ("fresh", "reused")
    }
    lines = [
        "# Dropping tokens on the CPU",
        "",
        f"Batch {BATCH}, sequence {LENGTH:,}, hidden {WIDTH:,}, float32, keep {KEPT:,}. Medians of {ROUNDS - 1}",
        "interleaved rounds. Copies: of everything that the operation writes, into torch's memory, and into memory in",
        "huge pages, which is what large results of penstock are in. The unit: gather, an identity layer and scatter.",
    ]
    for name, figures in runs.items():
        lines += ["", f"## {name.capitalize()}", "", *table(figures)]
    write_results("cpu_ops", runs, lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(int(sys.argv[1]))
    else:
        main()
