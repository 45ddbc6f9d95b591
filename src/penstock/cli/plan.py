"""``penstock plan``."""

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.options import Overrides


def plan(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", show_default=False, help="Configuration of a run, YAML or JSON."),
    ] = None,
    overrides: Overrides = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            show_default=False,
            help="Instead of choosing, lay the prediction for a run's own layout beside what it recorded "
            "(pipe.record_timeline).",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What each rank may take, such as 8GiB.", show_default=False)
    ] = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--micro-batch-size",
            help="Sizes to choose from. Repeatable; without it those of --profile, or the configuration's, half, "
            "two and four times it.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Use the measurements in this file instead of measuring.", show_default=False),
    ] = None,
    save_profile: Annotated[
        Path | None, typer.Option(help="Write the measurements to this file.", show_default=False)
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the configuration with the choice to this file.", show_default=False)
    ] = None,
    search: Annotated[
        float, typer.Option(min=0.0, help="Seconds to search for a schedule better than the built-in ones; 0 does not.")
    ] = 0.0,
    top: Annotated[int, typer.Option(help="How many candidates to print.")] = 10,
    timeline_file: Annotated[
        Path | None, typer.Option("--timeline", help="Write the predicted timeline to this .json file.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture of it.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write one in pixels; needs penstock[report].")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the picture.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto or chrome://tracing.")] = None,
) -> None:
    """Measure a model's layers, and choose how to cut it, schedule it and batch it.

    As many processes as the run has measure at once, on this machine.

    \b
    Examples:
      penstock plan run.yaml --memory 8GiB --write planned.yaml
      penstock plan run.yaml --save-profile layers.json --html step.html
      penstock plan run.yaml --profile layers.json --set pipe.stages=2 --search 20
      penstock plan --compare runs/first
    """
    from penstock.pipe.planner import layer_lines, plan_lines, save_profiles
    from penstock.runtime import planning
    from penstock.runtime.comparison import comparison_lines, prediction_of, read_recording
    from penstock.runtime.launch import launched
    from penstock.runtime.run_directory import CONFIG_NAME

    given = list(overrides or ())
    recording = None
    if compare is not None:
        if config is not None or sizes or memory or search or write:
            raise ValueError("--compare takes the run's own layout; leave out CONFIG and what would choose another one")
        recording = read_recording(compare)
        config, sizes = compare / CONFIG_NAME, [recording.micro_batch_size]
    if config is None:
        raise ValueError("give a configuration, penstock plan run.yaml, or a run, penstock plan --compare RUN")
    settings = planning.read_config(config, given)
    chosen_sizes = planning.candidate_sizes(settings, sizes or None)
    limit = None if memory is None else planning.bytes_of(memory)
    if launched():
        if save_profile is None:
            raise ValueError("started by a launcher, penstock plan only measures; give --save-profile FILE")
        planning.measure(settings, chosen_sizes, save_profile, memory=limit)
        return
    if profile is None:
        profiles = planning.measured_profiles(config, given, settings, chosen_sizes, memory=limit)
    else:
        profiles = planning.profiles_in(profile, settings, sizes)
    if save_profile is not None:
        save_profiles(profiles, save_profile)
    if recording is not None:
        predicted = prediction_of(recording, profiles)
        for line in comparison_lines(predicted, recording):
            typer.echo(line)
        planning.write_timeline(predicted.timeline, timeline_file, svg=svg, png=png, html=html, trace=trace)
        return
    found = planning.plan_run(settings, profiles, memory=limit, search_effort_s=search)
    shown = next(p for p in profiles if p.micro_batch_size == found.best.micro_batch_size)
    typer.echo(f"one micro-batch of {shown.micro_batch_size}, layer by layer:")
    for line in (*layer_lines(shown), "", *plan_lines(found, most=top)):
        typer.echo(line)
    for note in planning.notes(settings):
        typer.echo(note)
    planning.write_timeline(found.best.timeline, timeline_file, svg=svg, png=png, html=html, trace=trace)
    if write is not None:
        planning.write_config(settings, found.best, write)
        typer.echo(f"{write}: the configuration with this choice")
