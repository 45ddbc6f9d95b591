"""``penstock inspect``."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A dataset, analysis, checkpoint(s), run or .safetensors.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Of a dataset, read every token too, and account for every byte.")
    ] = False,
    column: Annotated[str | None, typer.Option("--column", show_default=False, help="Which column of a table.")] = None,
) -> None:
    """Say what lies at a path and whether it is intact; the exit code is 1 if not.

    \b
    Examples:
      penstock inspect data/train --verify
      penstock inspect tokens.parquet --column input_ids
      penstock inspect runs/demo
      penstock inspect runs/demo/checkpoints
      penstock inspect runs/demo/checkpoints/step_00000200
    """
    from penstock.runtime.inspection import inspect_path

    found = inspect_path(path, verify=verify, column=column)
    typer.echo(f"{path}: {found.kind}")
    width = max(map(len, found.facts), default=0)
    for name, value in found.facts.items():
        typer.echo(f"  {name:<{width}}  {value}")
    for problem in found.problems:
        typer.echo(typer.style(f"  problem: {problem}", fg=typer.colors.RED))
    typer.echo("intact" if found.intact else "not intact")
    if not found.intact:
        raise typer.Exit(1)
