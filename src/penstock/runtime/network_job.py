"""``penstock network``: measure the network between ranks, predict each algorithm's step, recommend one."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from penstock._core.waiting import Watcher
from penstock.compression import create_compression_algorithm
from penstock.compression.network.cost import (
    TOLERANCE,
    Prediction,
    Shapes,
    as_mapping,
    predict,
    quality,
    recommend,
    square_shapes,
)
from penstock.compression.network.probe import Network, measure_codec, measure_network
from penstock.compression.registry import algorithms_without_options
from penstock.compression.tensor_file import TensorFile
from penstock.runtime.launch import launch, launched
from penstock.runtime.process import Process

PERIOD: Final = 30
"""Steps between two exchanges of the methods that train apart."""
_APART: Final = ("none", "int8", "topk_int2")


def network(
    *,
    parameters: int | None,
    checkpoint: Path | None,
    step_time_s: float,
    processes: int,
    backend: str,
    deadline_s: float,
    as_json: bool,
) -> int:
    """Measure, predict and recommend; started alone it launches processes on this machine, else it joins the others.

    Args:
        parameters: Of the model.
        checkpoint: A .safetensors file whose tensors are the model's; in place of ``parameters``.
        step_time_s: Seconds of a training step on one rank without any exchange.
        processes: How many to launch; a launcher's number counts where there is a launcher.
        backend: ``gloo`` (tensors on the CPU) or ``nccl`` (on the GPU).
        deadline_s: How long a wait may last.
        as_json: Print JSON instead of tables.

    Returns:
        The exit code.

    Raises:
        ValueError: An argument is out of range, or the backend is not at hand.
    """
    shapes = _shapes(parameters, checkpoint)
    if not step_time_s > 0:
        raise ValueError(f"the step time must be positive, got {step_time_s:g} s; give --step-time SECONDS")
    if not deadline_s > 0:
        raise ValueError(f"the deadline must be positive, got {deadline_s:g} s")
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"unknown backend {backend!r}; known: gloo, nccl")
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("the backend nccl needs a GPU, and there is none here; take --backend gloo")
    ranks = int(os.environ["WORLD_SIZE"]) if launched() else processes
    if ranks < 2:
        raise ValueError(f"a network has at least 2 ranks, got {ranks}; give --processes 2, or launch more")
    if not launched():
        size = ["--checkpoint", str(checkpoint)] if checkpoint is not None else ["--parameters", str(parameters)]
        arguments = ["network", *size, "--step-time", repr(step_time_s), "--backend", backend]
        arguments += ["--deadline", repr(deadline_s), *(["--json"] if as_json else [])]
        return launch(arguments, processes=processes, shutdown_s=5.0)
    process = Process.join(deadline_s)
    device = torch.device("cpu") if backend == "gloo" else process.device
    try:
        with Watcher(rank=process.rank, deadline_s=deadline_s, store=process.store) as watcher:
            measured = measure_network(device, watcher)
            predictions = _predictions(measured, shapes, step_time_s, device) if process.rank == 0 else []
            with watcher.waiting("rank 0's predictions"):
                torch.distributed.barrier()
    finally:
        process.leave()
    if process.rank == 0:
        _print(measured, predictions, step_time_s, as_json=as_json)
    return 0


def _shapes(parameters: int | None, checkpoint: Path | None) -> Shapes:
    if (parameters is None) == (checkpoint is None):
        raise ValueError("say how large the model is: either --parameters NUMBER or --checkpoint FILE.safetensors")
    if checkpoint is not None:
        shapes = [shape for shape in TensorFile(checkpoint).floating_shapes() if 0 not in shape]
        if not shapes:
            raise ValueError(f"{checkpoint}: no floating tensors in it")
        return shapes
    if parameters is None or parameters < 1:
        raise ValueError(f"a model has at least one parameter, got {parameters}")
    return square_shapes(parameters)


def _predictions(measured: Network, shapes: Shapes, step_s: float, device: torch.device) -> list[Prediction]:
    predictions = []
    for name in algorithms_without_options()[0]:
        algorithm = create_compression_algorithm(name)
        codec = measure_codec(algorithm, device)
        predictions.append(predict(algorithm, codec, measured, shapes, step_s))
        if name in _APART:
            predictions.append(predict(algorithm, codec, measured, shapes, step_s, period=PERIOD))
    return sorted(predictions, key=lambda prediction: (prediction.period, prediction.step_s))


def _print(measured: Network, predictions: Sequence[Prediction], compute_s: float, *, as_json: bool) -> None:
    best = recommend(predictions, compute_s)
    if as_json:
        value: dict[str, Any] = {
            "network": asdict(measured),
            "compute_s": compute_s,
            "predictions": [as_mapping(prediction) for prediction in predictions],
            "recommended": best.algorithm,
            "quality": quality(best.relative_error),
        }
        print(json.dumps(value, indent=2))
        return
    console = Console()
    links = Table(title=f"{measured.ranks} ranks")
    links.add_column("collective")
    links.add_column("latency", justify="right")
    links.add_column("bandwidth", justify="right")
    for name, link in (
        ("all-reduce", measured.all_reduce),
        ("all-to-all", measured.all_to_all),
        ("all-gather", measured.all_gather),
    ):
        links.add_row(name, f"{link.latency_s * 1e3:.2f} ms", f"{link.bits_per_second / 1e6:,.0f} Mbit/s")
    console.print(links)
    table = Table(title=f"a step, of which {compute_s:g} s are compute")
    table.add_column("algorithm")
    for column in ("step", "bytes a step", "left out at once"):
        table.add_column(column, justify="right")
    for p in predictions:
        name = p.algorithm if p.period == 1 else f"{p.algorithm}, every {p.period} steps (local updates)"
        table.add_row(name, f"{p.step_s:.3f} s", f"{p.nbytes:,.0f}", f"{p.relative_error:.1%}")
    console.print(table)
    console.print(f"recommended: {best.algorithm}, {best.step_s:.3f} s a step")
    console.print(f"expected loss of quality: {quality(best.relative_error)}")
    needing = algorithms_without_options()[1]
    if needing:
        console.print(f"left out, because they need options: {', '.join(needing)}")
    console.print("(measured on normally distributed numbers: a guide, not your model's loss)")
    if best.step_s > (1 + TOLERANCE) * compute_s:
        apart = min((p for p in predictions if p.period > 1), key=lambda p: p.step_s)
        console.print(
            f"every exchange costs more than {TOLERANCE:.0%} of the compute; replicas that meet every {apart.period} "
            f"steps (DiLoCo, SparseLoCo; here with {apart.algorithm}) take {apart.step_s:.3f} s a step, but follow "
            "another course of training: compare losses"
        )
