"""``penstock schedule``."""

from typing import Annotated

import typer


def schedule(
    name: Annotated[str, typer.Argument(metavar="NAME", help="gpipe, 1f1b or forward_only.")],
    stages: Annotated[int, typer.Option("--stages", "-p", help="Pipeline stages.")],
    micro_batches: Annotated[int, typer.Option("--micro-batches", "-m", help="Micro-batches per step and replica.")],
    csv: Annotated[
        bool, typer.Option("--csv", help="Print only the actions, a line for each rank, as PyTorch reads them.")
    ] = False,
    forward: Annotated[float, typer.Option(help="Duration of a forward pass, in any unit.")] = 1.0,
    backward: Annotated[float, typer.Option(help="Duration of a backward pass.")] = 1.0,
    transfer: Annotated[float, typer.Option(help="Duration of a message between ranks.")] = 0.0,
    columns: Annotated[int, typer.Option(help="Width of the drawing.")] = 120,
) -> None:
    """Validate, simulate and draw a pipeline schedule.

    \b
    Examples:
      penstock schedule 1f1b --stages 4 --micro-batches 8
      penstock schedule gpipe -p 8 -m 32 --backward 2 --transfer 0.1
      penstock schedule 1f1b -p 4 -m 8 --csv > schedule.csv
    """
    from penstock.pipe.schedule import Costs, draw, get_schedule, simulate, validate

    made = get_schedule(name, stages, micro_batches)
    facts = validate(made)
    if csv:
        typer.echo(made.to_text(), nl=False)
        return
    timeline = simulate(made, Costs(forward=forward, backward=backward, transfer=transfer))
    typer.echo(draw(timeline, columns=columns))
    typer.echo(f"schedule          {made.name}, {stages} stages, {micro_batches} micro-batches: valid")
    typer.echo(f"makespan          {timeline.makespan:g}")
    typer.echo(f"bubble fraction   {timeline.bubble_fraction:.6f}")
    typer.echo(f"peak activations  {', '.join(map(str, facts.peak_activations))}  (micro-batches kept, by rank)")
    typer.echo(f"messages          {sum(facts.messages.values())} per step")
