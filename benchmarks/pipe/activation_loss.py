"""What compressed activations do to the loss: every `pipe.activation_compression`, by seed, beside none.

A small GPT reads the standard library's source files as bytes, cut into four stages, so that every value passes three
cuts forward and three back. A seed decides initial weights and order alike for all; the loss is that of held-out files
after the last step, without compression; bytes are what the ranks send between stages in a step::

    python -m benchmarks.pipe.activation_loss
"""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.pipe.processes import run_ranks

RANKS, LAYERS, WIDTH, LENGTH, ROWS, STEPS, SEEDS = 4, 6, 64, 128, 16, 150, (1, 2, 3)
RESULTS = Path(__file__).parents[1] / "results" / "pipe"


def _rows(heldout: bool, count: int) -> list[Any]:
    """``count`` windows of bytes, evenly spread over the files."""
    import numpy as np

    from penstock.data_pipeline.datasets.python_corpus import read_sources, standard_library_files

    files = [file for file in standard_library_files(max_bytes=6_000_000) if file.heldout is heldout]
    text = np.frombuffer("".join(text for _, text in read_sources(files)).encode(), dtype=np.uint8)
    starts = np.linspace(0, len(text) - LENGTH - 1, count).astype(np.int64)
    return [text[start : start + LENGTH + 1].astype(np.int64) for start in starts]


def _run(name: str, seed: int, training: list[Any], heldout: list[Any]) -> dict[str, float]:
    import torch

    import penstock
    from penstock._core.meter import ACTIVATIONS
    from penstock.models.gpt import GPTConfig, gpt_layers, gpt_loss
    from penstock.pipe.module import PipelineModule

    shape = GPTConfig(vocab_size=256, num_layers=LAYERS, hidden_size=WIDTH, num_heads=4, context_length=LENGTH)
    config = {
        "seed": seed,
        "pipe": {"stages": RANKS, "schedule": "1f1b", "activation_compression": name},
        "train": {"global_batch_size": ROWS, "micro_batch_size": 4, "steps": STEPS},
        "data": {"sequence_length": LENGTH},
        "optimizer": {"name": "adamw", "lr": 3e-3, "gradient_clipping": 1.0},
        "schedule": {"warmup_steps": 15, "decay": "cosine", "min_ratio": 0.1},
    }
    with penstock.initialize(
        PipelineModule(gpt_layers(shape), loss_fn=gpt_loss, base_seed=seed), config, training_data=training
    ) as engine:
        for _ in range(STEPS):
            engine.train_batch()
        sent = engine.parts.meter.sent[ACTIVATIONS] / STEPS
        losses = []
        for start in range(0, len(heldout), ROWS):
            rows = [
                torch.stack([torch.from_numpy(row) for row in heldout[at : at + 4]])
                for at in range(start, start + ROWS, 4)
            ]
            losses.append(
                engine.eval_batch(iter([(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]))
            )
    return {"loss": statistics.fmean(losses), "sent": sent}


def _worker() -> None:
    import torch

    from penstock.runtime.activation_codec import ACTIVATION_COMPRESSIONS

    torch.set_num_threads(1)
    training, heldout = _rows(False, ROWS * STEPS), _rows(True, 8 * ROWS)
    cells = {name: [_run(name, seed, training, heldout) for seed in SEEDS] for name in ACTIVATION_COMPRESSIONS}
    print(json.dumps(cells), flush=True)
    os._exit(0)


def main() -> None:
    """Measure, and write results/pipe/activation_loss.{json,md}."""
    answers = run_ranks("benchmarks.pipe.activation_loss", RANKS, timeout_s=3600.0)
    summary: dict[str, Any] = {}
    for name in answers[0]:
        losses = [cell["loss"] for cell in answers[0][name]]
        against = [loss - cell["loss"] for loss, cell in zip(losses, answers[0]["none"], strict=True)]
        sent = sum(answer[name][0]["sent"] for answer in answers)
        summary[name] = {"losses": losses, "difference": against, "sent": sent}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "activation_loss.json").write_text(json.dumps(summary, indent=1) + "\n")
    plain = summary["none"]["sent"]
    lines = [
        f"# Compressed activations: held-out loss after {STEPS} steps, {RANKS} stages, {len(SEEDS)} seeds",
        "",
        f"A GPT of {LAYERS} layers of width {WIDTH} on bytes of Python, {ROWS} x {LENGTH} a step; nats a byte.",
        "",
        "| name | loss, mean | against none, mean (lowest to highest) | bytes between stages | fewer |",
        "|---|---|---|---|---|",
    ]
    for name, row in summary.items():
        off = row["difference"]
        lines.append(
            f"| {name} | {statistics.fmean(row['losses']):.4f} | {statistics.fmean(off):+.4f} ({min(off):+.4f} to "
            f"{max(off):+.4f}) | {row['sent']:,.0f} a step | {plain / row['sent']:.1f}x |"
        )
    text = "\n".join(lines) + "\n"
    (RESULTS / "activation_loss.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _worker()
    else:
        main()
