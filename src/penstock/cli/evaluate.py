"""``penstock eval``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.options import Overrides

if TYPE_CHECKING:
    from penstock.runtime.checkpoint import Checkpoint


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or one checkpoint of it.")],
    overrides: Overrides = None,
) -> None:
    """Evaluate the newest complete checkpoint of a run on its held-out data.

    \b
    Examples:
      penstock eval runs/demo
      penstock eval runs/demo/checkpoints/step_00000200
      penstock eval runs/demo --set data.heldout=corpus/other
    """
    from dataclasses import asdict

    from penstock.runtime import main_job

    checkpoint = _resolve(run)
    shown = {"checkpoint": str(checkpoint.path), "step": f"{checkpoint.step:,}"}
    # The checkpoint and not the run, which may get a newer one meanwhile.
    for name, value in asdict(main_job.evaluate(checkpoint.path, list(overrides or ()))).items():
        if value is not None:
            shown[name.replace("_", " ")] = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
    width = max(map(len, shown))
    for name, text in shown.items():
        typer.echo(f"{name:<{width}}  {text}")


def _resolve(run: Path) -> "Checkpoint":
    """The checkpoint that is meant: the path's own, or the newest complete one of the run.

    Raises:
        ValueError: There is none; the message names those that there are.
    """
    from penstock._core.files import MANIFEST_NAME
    from penstock.runtime.checkpoint import latest_complete, list_checkpoints
    from penstock.runtime.engine_state import find
    from penstock.runtime.run_directory import CHECKPOINTS_NAME

    if (run / MANIFEST_NAME).is_file():
        return find(run)
    for directory in (run / CHECKPOINTS_NAME, run):
        if list_checkpoints(directory):
            return find(directory)
    beside = latest_complete(run.parent)  # a checkpoint was meant that is not there, or not complete
    if beside is not None:
        names = ", ".join(entry.path.name for entry in list_checkpoints(run.parent) if entry.sealed)
        raise ValueError(f"{run}: no complete checkpoint; in {run.parent} there are {names}")
    what = "it holds none" if run.is_dir() else "there is no such directory"
    raise ValueError(f"{run}: no complete checkpoint ({what}); give the directory of a run, or one checkpoint of it")
