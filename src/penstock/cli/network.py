"""``penstock network``."""

from pathlib import Path
from typing import Annotated

import typer


def network(
    parameters: Annotated[
        int | None, typer.Option("--parameters", show_default=False, help="Parameters of the model.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", show_default=False, help="A .safetensors file of the model, instead."),
    ] = None,
    step_time: Annotated[
        float, typer.Option("--step-time", metavar="SECONDS", help="Of a step on one rank, without any exchange.")
    ] = 1.0,
    processes: Annotated[
        int, typer.Option("--processes", help="How many to launch here; under a launcher, its number counts.")
    ] = 2,
    backend: Annotated[str, typer.Option("--backend", help="gloo (CPU) or nccl (GPU).")] = "gloo",
    deadline: Annotated[float, typer.Option("--deadline", metavar="SECONDS", help="How long a wait may last.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the network between the ranks, predict a step with each compression algorithm, and recommend one.

    \b
    Examples:
      penstock network --parameters 25000000 --step-time 0.3
      torchrun --nnodes 2 --rdzv-endpoint HOST:29500 -m penstock network --checkpoint model.safetensors
    """
    from penstock.runtime import network_job

    code = network_job.network(
        parameters=parameters,
        checkpoint=checkpoint,
        step_time_s=step_time,
        processes=processes,
        backend=backend,
        deadline_s=deadline,
        as_json=as_json,
    )
    if code:
        raise typer.Exit(code)
