"""Compress and decompress 25 M float32 on one core, in units of one read-modify-write pass over the same memory.

::

    python -m benchmarks.compression.kernels

The contenders take turns; medians over the rounds. ``feed`` compresses with error memory; ``plain torch`` is the
composition that one would write first.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.compression import create_compression_algorithm
from penstock.compression.kernels import use_kernels

ELEMENTS, ROUNDS = 25_000_000, 15
LIMITS = {"onebit": 4.0, "int8": 6.0, "int4": 6.0}
RESULTS = Path(__file__).parents[1] / "results" / "compression"


def contenders(x: Tensor) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Compression with error memory and decompression, by name."""
    made: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name in LIMITS:
        for choice in ("auto", "none"):
            algorithm = create_compression_algorithm(name)
            memory, out = torch.zeros_like(x), torch.empty_like(x)
            payload = algorithm.compress(x)

            def feed(algorithm: Any = algorithm, memory: Tensor = memory, choice: Any = choice) -> None:
                use_kernels(choice)
                algorithm.compress_with_memory(x, memory)

            def back(
                algorithm: Any = algorithm, payload: Any = payload, out: Tensor = out, choice: Any = choice
            ) -> None:
                use_kernels(choice)
                algorithm.decompress(payload, out)

            made[f"{name}{'' if choice == 'auto' else ', no kernels'}"] = feed, back
    memory = torch.zeros_like(x)

    def plain_feed() -> None:
        total = memory + x
        scales = total.view(-1, 1000).abs().mean(1, keepdim=True)
        signs = total.sign().view(-1, 1000)
        memory.copy_((total.view(-1, 1000) - scales * signs).view(-1))
        packed = (signs > 0).view(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
        plain_feed.payload = scales, packed.sum(1, dtype=torch.uint8)  # type: ignore[attr-defined]

    def plain_back() -> Tensor:
        scales, packed = plain_feed.payload  # type: ignore[attr-defined]
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return (bits.view(-1, 1000).float() * 2 - 1) * scales

    made["onebit, plain torch"] = plain_feed, plain_back
    return made


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and write ``results/compression/kernels.{json,md}``."""
    torch.set_num_threads(1)
    x = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0))
    touched = x.clone()
    calls = contenders(x)
    for feed, back in calls.values():  # compile, and touch all memory once
        feed()
        back()
    passes: list[float] = []
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (feed, back) in calls.items():
            passes.append(seconds(lambda: touched.mul_(1.0001)))
            times[name].append((seconds(feed), seconds(back)))
    unit = statistics.median(passes)
    rows = {}
    for name, pairs in times.items():
        both = [feed + back for feed, back in pairs]
        rows[name] = {
            "feed_ms": statistics.median(feed for feed, _ in pairs) * 1e3,
            "decompress_ms": statistics.median(back for _, back in pairs) * 1e3,
            "passes": statistics.median(both) / unit,
            "passes_quartiles": [quartile / unit for quartile in statistics.quantiles(both, n=4)[::2]],
            "limit": LIMITS.get(name),
        }
    lines = [
        "# Compress and decompress 25 M float32 on one core",
        "",
        f"Medians of {ROUNDS} rounds. One read-modify-write pass (`tensor.mul_`) over as many elements takes",
        f"{unit * 1e3:.2f} ms.",
        "",
        "| | compress with error update, ms | decompress, ms | passes (quartiles) | wanted |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["passes_quartiles"]
        wanted = "" if row["limit"] is None else f"at most {row['limit']:g}"
        lines.append(
            f"| {name} | {row['feed_ms']:.1f} | {row['decompress_ms']:.1f} "
            f"| {row['passes']:.2f} ({low:.2f}-{high:.2f}) | {wanted} |"
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "kernels.json").write_text(json.dumps({"pass_ms": unit * 1e3, "rows": rows}, indent=2) + "\n")
    (RESULTS / "kernels.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
