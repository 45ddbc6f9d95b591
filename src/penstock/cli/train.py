"""``penstock train``."""

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.options import Overrides


def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG]",
            show_default=False,
            help="YAML or JSON; without it a small GPT is trained on this Python's standard library.",
        ),
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", show_default=False, help="Directory of the run.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the directory.")] = False,
) -> None:
    """Train a model: launch the processes, checkpoint, evaluate, and sum up what was spent.

    Started by torchrun or another launcher, it joins the given processes instead.

    \b
    Examples:
      penstock train
      penstock train run.yaml --set train.steps=100 --output runs/first
      torchrun --nproc-per-node 4 -m penstock train run.yaml
    """
    from penstock.runtime import main_job

    code = main_job.train(config, list(overrides or ()), output, resume=resume, overwrite=overwrite)
    if code:
        raise typer.Exit(code)
