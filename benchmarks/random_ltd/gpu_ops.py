"""The Triton kernels beside copies on the device, and what dropping saves of a training step on a GPU.

Gather and combine in bfloat16 for hidden sizes 1,024 to 8,192 and 25 to 75% kept, against a device-to-device copy of
what each writes and against the way of DeepSpeed's published kernels, in torch: sort, gather, clone, scatter.
Then whole steps of a GPT of 12 and 24 layers at context 2,048 to 8,192. Without a GPU it says so and measures nothing::

    python -m benchmarks.random_ltd.gpu_ops
"""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.random_ltd._results import write_results
from benchmarks.random_ltd.end_to_end import HEAD, line, saving

BATCH, LENGTH = 8, 2048
HIDDEN, KEEP = (1024, 2048, 4096, 8192), (0.25, 0.5, 0.75)
LAYERS, CONTEXTS, TOKENS = (12, 24), (2048, 4096, 8192), 16384
ROUNDS = 30


def timed(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each, in turn, the caches emptied before each."""
    import torch

    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 3):
        for name, way in ways.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            way()
            end.record()
            end.synchronize()
            if number >= 3:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def kernels(hidden: int, keep: float) -> dict[str, float]:
    """Milliseconds of each way for one size."""
    import torch

    from penstock.data_pipeline.random_ltd import gpt_sample_tokens, ops

    kept = round(keep * LENGTH)
    x = torch.randn(BATCH, LENGTH, hidden, dtype=torch.bfloat16, device="cuda")
    y = torch.randn(BATCH, kept, hidden, dtype=torch.bfloat16, device="cuda")
    indices = gpt_sample_tokens(kept, LENGTH, BATCH, device="cuda", key=1)[0][0]
    wide = indices.long()[:, :, None].expand(-1, -1, hidden)
    shuffled = indices.flip(1)

    def sort_gather() -> Any:
        return x.gather(1, shuffled.sort(dim=1).values.long()[:, :, None].expand(-1, -1, hidden))

    return timed(
        {
            "gather": lambda: ops.gather(x, indices, True),
            "copy of the kept": y.clone,
            "sort + gather": sort_gather,
            "combine": lambda: ops.combine(x, y, indices, LENGTH, True),
            "copy of all": x.clone,
            "clone + scatter": lambda: x.clone().scatter_(1, wide, y),
        }
    )


def main() -> None:
    """Measure and write ``results/random_ltd/gpu_ops.{json,md}``, if there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing measured")
        return
    sizes = {f"hidden {hidden:,}, keep {keep:.0%}": kernels(hidden, keep) for hidden in HIDDEN for keep in KEEP}
    steps = {
        f"{layers} layers, context {context:,}": saving(
            "cuda",
            layers=layers,
            width=1024,
            heads=16,
            context=context,
            batch=TOKENS // context,
            keep=0.5,
            rounds=10,
            bf16=True,
        )
        for layers in LAYERS
        for context in CONTEXTS
    }
    lines = [
        f"# Dropping tokens on {torch.cuda.get_device_name()}",
        "",
        f"bfloat16, batch {BATCH}, sequence {LENGTH:,}; medians of {ROUNDS} interleaved rounds with cold caches.",
        "",
        "| size | gather / copy | sort + gather / gather | combine / copy | clone + scatter / combine |",
        "|---|---|---|---|---|",
    ]
    for name, ms in sizes.items():
        ratios = (
            ms["gather"] / ms["copy of the kept"],
            ms["sort + gather"] / ms["gather"],
            ms["combine"] / ms["copy of all"],
            ms["clone + scatter"] / ms["combine"],
        )
        lines.append(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    lines += ["", f"GPT of width 1,024 under bfloat16 autocast, {TOKENS:,} tokens a step, half kept:", "", *HEAD]
    lines += [line(name, facts) for name, facts in steps.items()]
    write_results("gpu_ops", {"kernels_ms": sizes, "steps": steps}, lines)


if __name__ == "__main__":
    main()
