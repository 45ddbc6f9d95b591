"""``penstock schedule``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from penstock.pipe.schedule import Costs, Found

_DRAWN = 4096
"""Actions up to which a drawing is printed unasked."""


def schedule(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A built-in schedule (1f1b, gpipe, looped_bfs, interleaved_1f1b, zb_h1, zb_h2, zb_v, v_half, v_min, "
            "dualpipe_v, seq1f1b, forward_only) or a schedule file (.json). With --search: a placement, loop or v.",
        ),
    ],
    ranks: Annotated[int, typer.Option("--ranks", "--stages", "-p", help="Pipeline ranks.")],
    micro_batches: Annotated[int, typer.Option("--micro-batches", "-m", help="Micro-batches per step and replica.")],
    chunks: Annotated[int | None, typer.Option(help="Stages per rank.")] = None,
    slices: Annotated[int | None, typer.Option(help="Pieces along the sequence (seq1f1b).")] = None,
    forward: Annotated[float, typer.Option(help="Duration of a forward pass, in any unit.")] = 1.0,
    backward: Annotated[
        float | None, typer.Option(help="Duration of a whole backward pass. By default both halves together.")
    ] = None,
    input_gradient: Annotated[float, typer.Option(help="Duration of its first half, where it is split.")] = 1.0,
    weight_gradient: Annotated[float, typer.Option(help="Duration of its second half.")] = 1.0,
    transfer: Annotated[float, typer.Option(help="Duration of a message between ranks.")] = 0.0,
    costs: Annotated[
        Path | None,
        typer.Option(
            help="A YAML or JSON file with any of forward, input_gradient, weight_gradient, backward, transfer, "
            "activations: a number, or one for each stage (transfer: for each pair of neighbouring stages)."
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Search for the shortest schedule; needs penstock[search] for the solver.")
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(help="With --search: what a rank may keep, in the unit of activations; by default micro-batches."),
    ] = None,
    effort: Annotated[float, typer.Option(help="With --search: about how many seconds the solver may take.")] = 20.0,
    solver: Annotated[bool, typer.Option(help="With --search: use the solver, or only rules.")] = True,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print only the actions, a line for each rank, as PyTorch reads them.")
    ] = False,
    communication: Annotated[
        bool, typer.Option("--communication", help="With --csv: with sends and receives.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write the schedule to this .json file, for a run to name.")] = None,
    timeline_file: Annotated[
        Path | None, typer.Option("--timeline", help="Write the timeline to this .json file.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write one in pixels; needs penstock[report].")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the picture.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto or chrome://tracing.")] = None,
    columns: Annotated[int, typer.Option(help="Width of the printed drawing.")] = 120,
) -> None:
    """Validate, simulate, draw, save or search for a pipeline schedule.

    \b
    Examples:
      penstock schedule 1f1b --ranks 4 --micro-batches 8
      penstock schedule zb_v -p 4 -m 8 --transfer 0.05 --html zb_v.html
      penstock schedule interleaved_1f1b -p 8 -m 32 --chunks 4 --backward 2
      penstock schedule v -p 3 -m 4 --search --memory 4 --save mine.json
      penstock schedule 1f1b -p 4 -m 8 --csv > schedule.csv
    """
    from penstock._core.files import write_bytes
    from penstock.pipe import schedule as schedules

    prices, activations = _costs(costs, forward, input_gradient, weight_gradient, backward, transfer)
    found, problem = None, None
    if search:
        if slices is not None:
            raise ValueError("--search does not cut micro-batches into slices; leave --slices out")
        placement = schedules.get_placement(name, ranks, chunks or (2 if name == "v" else 1))
        problem = schedules.Problem(placement, micro_batches, prices, memory=memory, activations=activations)
        found = schedules.search(problem, effort_s=effort, solver=solver)
        made = found.schedule
    else:
        if memory is not None:
            raise ValueError("--memory limits what --search looks for; give both or neither")
        made = schedules.get_schedule(name, ranks, micro_batches, chunks, slices)
    capacity = schedules.needed_capacity(made)
    facts = schedules.validate(made, capacity=capacity)
    if save is not None:
        schedules.save_schedule(made, save, found.notes(problem) if found and problem else None)
    if csv:
        typer.echo(schedules.text_with_communication(made) if communication else made.to_text(), nl=False)
        return
    timeline = schedules.simulate(made, prices)
    if timeline_file is not None:
        schedules.save_timeline(timeline, timeline_file)
    if svg is not None:
        write_bytes(svg, schedules.svg(timeline).encode())
    if png is not None:
        write_bytes(png, schedules.png(timeline))
    if html is not None:
        write_bytes(html, schedules.html(timeline).encode())
    if trace is not None:
        schedules.save_trace(timeline, trace)
    if made.num_actions <= _DRAWN:
        typer.echo(schedules.draw(timeline, columns=columns))
    slices_said = f" of {made.slices} slices" if made.slices > 1 else ""
    typer.echo(
        f"schedule          {made.name}, {made.num_stages} stages on {made.num_ranks} ranks, "
        f"{made.micro_batches} micro-batches{slices_said}: valid"
    )
    if found is not None:
        _say_found(found)
    typer.echo(f"makespan          {timeline.makespan:g}")
    typer.echo(f"bubble fraction   {timeline.bubble_fraction:.6f} of the makespan")
    typer.echo(f"                  {timeline.span_bubble_fraction:.6f} of the longest rank's span")
    if not made.forward_only:
        typer.echo(f"peak activations  {_listed(facts.peak_activations)}  (kept at a time, by rank)")
    typer.echo(f"messages          {sum(facts.messages.values())} per step, channels of {capacity}")


def _costs(
    path: Path | None,
    forward: float,
    input_gradient: float,
    weight_gradient: float,
    backward: float | None,
    transfer: float,
) -> "tuple[Costs, float | list[float]]":
    """The durations, and what a micro-batch of a stage keeps; a file's entries go before the options'."""
    from penstock.pipe.schedule import Costs

    values: dict[str, Any] = {
        "forward": forward,
        "input_gradient": input_gradient,
        "weight_gradient": weight_gradient,
        "backward": backward,
        "transfer": transfer,
        "activations": 1.0,
    }
    if path is not None:
        values |= _read_costs(path, tuple(values))
    activations = values.pop("activations")
    return Costs(**values), activations


def _read_costs(path: Path, known: Sequence[str]) -> dict[str, Any]:
    import yaml

    from penstock._core.suggest import unknown_name

    try:
        read = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML or JSON ({error})") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path}: must be a table of costs, such as 'forward: [1.0, 1.2]'")
    for key, value in read.items():
        if key not in known:
            raise ValueError(f"{path}: {unknown_name('cost', str(key), known)}")
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float) or isinstance(number, bool):
                raise ValueError(f"{path}: {key!r} must be a number or a list of numbers, found {value!r}")
    return read


def _say_found(found: "Found") -> None:
    if found.built_in is None:
        typer.echo(f"found by          {found.origin}; no built-in schedule has this placement and fits")
    else:
        typer.echo(f"found by          {found.origin}; best built-in: {found.built_in}, {found.built_in_makespan:g}")
    proof = "proved to be among the shortest" if found.optimal else f"none is shorter than {found.bound:g}"
    typer.echo(f"optimality        {proof}")


def _listed(values: Sequence[int], most: int = 32) -> str:
    more = f", ... ({len(values)} in all)" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
