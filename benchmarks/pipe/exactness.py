"""Every schedule against one process: the same GPT in float64, with each feature that could make a difference.

Weights are tied between the first and the last stage and dropout is on in all of them, but under the sliced schedule,
whose slices draw other random numbers than whole sequences. What is compared after three optimizer steps of eight
micro-batches, with clipping: losses, weights and both moments. A cell is the worst difference of a tensor, over its
largest element::

    python -m benchmarks.pipe.exactness
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.pipe.processes import run_ranks

STEPS, MICRO_BATCHES, VOCAB, LENGTH, DROPOUT = 3, 8, 61, 24, 0.1
RESULTS = Path(__file__).parents[1] / "results" / "pipe"

VARIANTS: dict[str, dict[str, Any]] = {
    "tied weights, dropout": {},
    "dropping": {"random_ltd": {"layers": "middle", "min_tokens": 8, "steps": STEPS, "seq_per_step": 4}},
    "checkpointing": {"pipe": {"activation_checkpoint_interval": 1}},
    "variable lengths": {"batches": "lengths"},
    "dict inputs": {"batches": "dicts"},
    "2 replicas": {"data_parallel": {"replicas": 2}},
    "FSDP2, 2 replicas": {"data_parallel": {"replicas": 2, "sharding": "fsdp2"}},
    "steps on trust": {"optimizer": {"post_validation": True}},
    "vocabulary in 3 parts": {"vocabulary_parts": 3},
    "tensor parallel": {"tensor_parallel": {"size": 2}},
    "FSDP2, tensor parallel": {
        "data_parallel": {"replicas": 2, "sharding": "fsdp2"},
        "tensor_parallel": {"size": 2},
    },
}
_NOT_SLICED: Final = ("dropping", "checkpointing", "FSDP2, 2 replicas", "FSDP2, tensor parallel")
"""What a run refuses together with slices."""
_NO_SECTIONS: Final = ("batches", "vocabulary_parts")


def _layout(variant: dict[str, Any], ranks: int) -> tuple[int, int] | None:
    """Stages of a variant on so many processes, and how many have the same stage; None where it is not run there."""
    each = variant.get("data_parallel", {}).get("replicas", 1) * variant.get("tensor_parallel", {}).get("size", 1)
    stages = 2 if each > 1 else min(ranks, 4)
    return (stages, each) if stages * each == ranks else None


def _settings(schedule: str, stages: int, variant: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "seed": 5,
        "deadline_s": 60,
        "precision": "float64",
        "pipe": {"stages": stages, "schedule": schedule},
        "train": {"global_batch_size": MICRO_BATCHES, "micro_batch_size": 1, "steps": STEPS},
        "data": {"sequence_length": LENGTH},
        "optimizer": {"lr": 1e-3, "gradient_clipping": 1.0},
        "schedule": {"decay": "constant"},
    }
    for section, values in variant.items():
        if section not in _NO_SECTIONS:
            made[section] = {**made.get(section, {}), **values}
    return made


def _batches(step: int, kind: str | None) -> list[tuple[Any, Any]]:
    import torch

    generator = torch.Generator().manual_seed(step)
    pairs: list[tuple[Any, Any]] = []
    for index in range(MICRO_BATCHES):
        length = LENGTH - 3 * (index % 4) if kind == "lengths" else LENGTH
        row = torch.randint(VOCAB, (1, length + 1), generator=generator)
        inputs: Any = row[:, :-1].contiguous()
        if kind == "dicts":  # positions that are not those counted along the row
            inputs = {"input_ids": inputs, "position_ids": torch.arange(length)[None] // 2}
        pairs.append((inputs, row[:, 1:].contiguous()))
    return pairs


def _train(settings: dict[str, Any], variant: dict[str, Any], *, dropout: float) -> dict[str, Any]:
    """Losses, and this rank's weights and moments by name."""
    import torch

    import penstock
    from penstock._core.meter import Meter
    from penstock.models.gpt import GPTConfig, gpt_layers, gpt_loss
    from penstock.pipe import PipelineModule
    from penstock.runtime.sharding.tensors import full_tensor

    torch.set_num_threads(1)
    shape = GPTConfig(
        vocab_size=VOCAB,
        num_layers=6,
        hidden_size=16,
        num_heads=2,
        context_length=LENGTH,
        dropout=dropout,
        init_std=0.2,
        vocabulary_parts=variant.get("vocabulary_parts", 1),
    )
    kind = variant.get("batches")
    with penstock.initialize(PipelineModule(gpt_layers(shape), loss_fn=gpt_loss), settings) as engine:
        cut, parts = engine.parts.cut, engine.parts

        def mine(step: int) -> Iterator[Any]:
            rows = _batches(step, kind)
            return iter([rows[index] for index in cut.indices()])

        losses = [engine.train_batch(mine(step)) for step in range(STEPS)]
        found: dict[str, Any] = {"loss": torch.tensor(losses, dtype=torch.float64)}
        engine.validate()
        for name, parameter in engine.stage.canonical_parameters():
            for key, tensor in {"weight": parameter, **engine.optimizer.state[parameter]}.items():
                whole = full_tensor(tensor.detach(), groups=parts.groups, meter=Meter())
                found[f"{key} {name}"] = whole.clone()
    return found


def _worker(ranks: int, schedules: str, folder: str) -> None:
    import torch.distributed as dist
    from safetensors.torch import load_file

    from penstock.pipe.schedule import SCHEDULES

    dist.init_process_group("gloo")
    answers: dict[str, dict[str, float]] = {}
    for name, variant in VARIANTS.items():
        layout = _layout(variant, ranks)
        if layout is None:
            continue
        answers[name] = {}
        for schedule in schedules.split(","):
            sliced = SCHEDULES[schedule].sliced
            if sliced and name in _NOT_SLICED:
                continue
            dropout = 0.0 if sliced else DROPOUT
            wanted = load_file(Path(folder) / f"{name} {dropout}.safetensors")
            found = _train(_settings(schedule, layout[0], variant), variant, dropout=dropout)
            answers[name][schedule] = max(
                float((tensor - wanted[key]).abs().max() / wanted[key].abs().max()) for key, tensor in found.items()
            )
    print(json.dumps(answers), flush=True)
    dist.barrier()
    os._exit(0)  # nothing of the groups is needed any more


def main() -> None:
    """Run, and write results/pipe/exactness.{json,md}."""
    from safetensors.torch import save_file

    from penstock.pipe.schedule import SCHEDULES

    started = time.perf_counter()
    schedules = [name for name, known in SCHEDULES.items() if known.trains]
    worst: dict[str, dict[str, float]] = {name: {} for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for name, variant in VARIANTS.items():
            plain = {k: v for k, v in variant.items() if k not in ("data_parallel", "tensor_parallel")}
            plain["optimizer"] = {}  # the single process waits for the norm
            for dropout in (DROPOUT, 0.0):
                found = _train(_settings("1f1b", 1, plain), plain, dropout=dropout)
                save_file(found, Path(folder) / f"{name} {dropout}.safetensors")
        for ranks in (2, 4, 8):
            answers = run_ranks("benchmarks.pipe.exactness", ranks, ",".join(schedules), folder, timeout_s=600.0)
            for answer in answers:
                for name, cells in answer.items():
                    layout = _layout(VARIANTS[name], ranks)
                    assert layout is not None  # it was run
                    for schedule, value in cells.items():
                        label = f"{schedule}, {layout[0]} stages"
                        worst[name][label] = max(value, worst[name].get(label, 0.0))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "exactness.json").write_text(json.dumps(worst, indent=1) + "\n")
    text = _table(worst)
    (RESULTS / "exactness.md").write_text(text)
    print(text)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


def _table(worst: dict[str, dict[str, float]]) -> str:
    rows = dict.fromkeys(label for cells in worst.values() for label in cells)
    largest = max(value for cells in worst.values() for value in cells.values())
    lines = [
        "# Every schedule against one process, float64",
        "",
        f"Worst relative difference of losses, weights and moments after {STEPS} steps of {MICRO_BATCHES} "
        f"micro-batches of a GPT with tied weights and dropout ({DROPOUT}; none in slices), gradients clipped. The "
        f"largest is {largest:.1e}. Schedules marked * split backward passes. Empty: not run on that number of stages, "
        "or refused (slices with dropping, checkpointing or sharding).",
        "",
        "| | " + " | ".join(worst) + " |",
        "|---" * (len(worst) + 1) + "|",
    ]
    lines += [
        f"| {row}{_mark(row)} | "
        + " | ".join(f"{cells[row]:.0e}" if row in cells else "" for cells in worst.values())
        + " |"
        for row in sorted(rows)
    ]
    return "\n".join(lines) + "\n"


def _mark(row: str) -> str:
    from penstock.pipe.schedule import SCHEDULES

    return " *" if SCHEDULES[row.partition(",")[0]].split else ""


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _worker(int(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        main()
