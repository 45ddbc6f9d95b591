"""``penstock eval``."""

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.options import Overrides


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or one checkpoint of it.")],
    overrides: Overrides = None,
) -> None:
    """Evaluate the newest complete checkpoint of a run on its held-out data.

    \b
    Examples:
      penstock eval runs/demo
      penstock eval runs/demo --set data.heldout=corpus/other
    """
    from dataclasses import asdict

    from penstock.runtime import main_job

    for name, value in asdict(main_job.evaluate(run, list(overrides or ()))).items():
        if value is not None:
            typer.echo(f"{name.replace('_', ' ')}: {f'{value:.4f}' if isinstance(value, float) else f'{value:,}'}")
