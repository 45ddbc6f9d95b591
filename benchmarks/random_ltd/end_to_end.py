"""How much of the FLOPs that dropping saves shows in the time of a training step, on the CPU.

The reference GPT at context 1,024, all blocks but the first and the last keep half of the tokens, against the same
model keeping all; forward, backward and AdamW, the two kinds of step in turn. Two minutes on an idle machine::

    python -m benchmarks.random_ltd.end_to_end
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.random_ltd._results import REUSE, write_results

CONTEXT, BATCH, LAYERS, WIDTH, HEADS, VOCABULARY = 1024, 2, 8, 512, 8, 4096
ROUNDS = 5


def saving(
    device: str, *, layers: int, width: int, heads: int, context: int, batch: int, keep: float, rounds: int, bf16: bool
) -> dict[str, Any]:
    """Seconds of full and dropping steps in turn, and the shares of FLOPs and time that dropping saves."""
    import torch

    from penstock.data_pipeline.random_ltd import RandomLayerTokenDrop, convert_to_random_ltd
    from penstock.models.flops import gpt_flops
    from penstock.models.gpt import GPTConfig, gpt_loss, gpt_model

    shape = GPTConfig(
        vocab_size=VOCABULARY, num_layers=layers, hidden_size=width, num_heads=heads, context_length=context
    )
    model = gpt_model(shape).to(device).train()
    convert_to_random_ltd(model, tuple(f"layers.{at}" for at in range(2, layers)))
    wrappers = [one for one in model.modules() if isinstance(one, RandomLayerTokenDrop)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(VOCABULARY, (batch, context + 1), device=device)
    kept = round(keep * context)
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step(reserved: int | None) -> float:
        for wrapper in wrappers:
            wrapper.reserved_length = reserved
        wait()
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = gpt_loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - begin

    times: dict[str, list[float]] = {"full": [], "dropping": []}
    for number in range(rounds + 1):
        for kind, reserved in (("full", None), ("dropping", kept)):
            seconds = step(reserved)
            if number:
                times[kind].append(seconds)
    full, dropping = (statistics.median(times[kind]) for kind in ("full", "dropping"))
    flops = [gpt_flops(shape, batch, context, dropping_layers=dropped, kept=kept) for dropped in (0, len(wrappers))]
    saved_flops, saved_time = 1 - flops[1] / flops[0], 1 - dropping / full
    return {
        "times_s": times,
        "full_s": full,
        "dropping_s": dropping,
        "flops_saved": saved_flops,
        "time_saved": saved_time,
        "share_that_shows": saved_time / saved_flops,
    }


def line(name: str, facts: dict[str, Any]) -> str:
    """One row of the table below :data:`HEAD`."""
    spreads = [f"{min(times):.3f} to {max(times):.3f}" for times in facts["times_s"].values()]
    return (
        f"| {name} | {facts['full_s']:.3f} ({spreads[0]}) | {facts['dropping_s']:.3f} ({spreads[1]}) "
        f"| {facts['flops_saved']:.1%} | {facts['time_saved']:.1%} | {facts['share_that_shows']:.2f} |"
    )


HEAD = [
    "| run | full step, s (range) | dropping, s (range) | FLOPs saved | time saved | share that shows |",
    "|---|---|---|---|---|---|",
]


def child(threads: int) -> None:
    """Measure with so many threads; print the facts."""
    import torch

    torch.set_num_threads(threads)
    sizes = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "context": CONTEXT, "batch": BATCH}
    print(json.dumps(saving("cpu", **sizes, keep=0.5, rounds=ROUNDS, bf16=False)))


def main() -> None:
    """Measure and write ``results/random_ltd/end_to_end.{json,md}``."""
    runs = {}
    for threads in (1, 2):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), **REUSE}
        command = [sys.executable, "-m", "benchmarks.random_ltd.end_to_end", str(threads)]
        out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs[f"{threads} thread{'s' * (threads > 1)}"] = json.loads(out.splitlines()[-1])
    lines = [
        "# A training step with half of the tokens in the middle layers",
        "",
        f"Reference GPT, {LAYERS} blocks of width {WIDTH}, of which {LAYERS - 2} drop; context {CONTEXT:,},",
        f"batch {BATCH}, float32.",
        f"Medians of {ROUNDS} steps of each kind in turn, with AdamW. FLOPs of matrix products by formula.",
        "",
        *HEAD,
        *(line(name, facts) for name, facts in runs.items()),
    ]
    write_results("end_to_end", runs, lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(int(sys.argv[1]))
    else:
        main()
