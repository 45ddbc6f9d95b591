"""``penstock order``."""

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.options import Overrides


def order(
    source: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", show_default=False, help="A configuration or a run's directory.")
    ] = None,
    start: Annotated[int, typer.Option("--from", min=0, help="Samples consumed before the first one.")] = 0,
    stop: Annotated[
        int | None, typer.Option("--to", min=0, show_default=False, help="One past the last; by default one batch.")
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option("--verify", metavar="RUN", show_default=False, help="Prove which samples a run has trained on."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print which samples a run reads when, without running it; or verify that a run has read those.

    The column "place" is what sampling.skip_ranges is counted in: nothing is skipped there.

    \b
    Examples:
      penstock order config.yaml
      penstock order runs/a --from 64000 --to 64512
      penstock order --verify runs/a
    """
    from rich.console import Console

    from penstock.runtime.order_check import rows, run_order, verify_run

    if (source is None) == (verify is None):
        raise ValueError("name either a configuration (or a run's directory) to print its order, or --verify RUN")
    if verify is not None:
        accounts = verify_run(verify, list(overrides or ()))
        for account in accounts:
            verdict = "as the order says" if account.proved else "NOT what the order says"
            unknown = account.samples - account.entered
            if unknown:
                verdict += f" ({unknown:,} of them came from a data iterator, not from the order)"
            typer.echo(f"step {account.step}  {account.samples:,} samples  {account.digest}  {verdict}")
        if not all(account.proved for account in accounts):
            raise typer.Exit(1)
        return
    assert source is not None
    with Console(stderr=True).status("preparing the order") as status:

        def show(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {done:,} of {total:,} samples")

        config, found, feed = run_order(source, list(overrides or ()), progress=show)
        stop = start + config.train.global_batch_size if stop is None else stop
        if stop < start:
            raise ValueError(f"--to {stop} lies before --from {start}")
    typer.echo("consumed\tposition\tplace\tsample" + ("" if found.mixture is None else "\tcorpus"))
    for row in rows(found, feed, start, stop):
        typer.echo("\t".join(map(str, row)))
