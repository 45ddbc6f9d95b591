"""``penstock analyze``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

_LOSS: Final = "loss"


class EngineChoice(StrEnum):
    """Where the work is done."""

    NATIVE = "native"
    RAY = "ray"


def analyze(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="PREFIX of .bin/.idx, Parquet or JSONL of tokens, .npy; or a URL.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory for the analysis.")],
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "-m",
            metavar="NAME",
            help="seqlen, vocabularyrarity, compressionratio, uniqueratio, repeatedngrams, loss (with --model), or "
            "package.module:function. Repeatable; without it, the first two.",
        ),
    ] = None,
    total: Annotated[
        list[str] | None,
        typer.Option(
            "--total",
            metavar="NAME",
            show_default=False,
            help="package.module:function, whose arrays are added up over all samples. Repeatable.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", show_default=False, help="For loss: a run, a checkpoint, or a Hugging Face model."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", "-l", show_default=False, help="Analyze windows of this many tokens (data.sequence_length)."
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", show_default=False, help="Column of a table that holds the tokens.")
    ] = None,
    engine: Annotated[
        EngineChoice, typer.Option("--engine", help="This machine's cores, or a Ray cluster (RAY_ADDRESS).")
    ] = EngineChoice.NATIVE,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an analysis that was cut off.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there, also an analysis that was cut off.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", show_default=False, help="Draw the distributions (.png, .svg or .pdf)."),
    ] = None,
) -> None:
    """Measure the difficulty of every sample, for a curriculum.

    \b
    Examples:
      penstock analyze data/train data/train-difficulty --length 256
      penstock analyze tokens.parquet difficulty --metric seqlen --column input_ids
      penstock analyze data/train difficulty -m loss --model runs/demo --picture difficulty.png
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from penstock.data_pipeline.data_sampling.analyzer import DEFAULT_METRICS, DataAnalyzer
    from penstock.data_pipeline.data_sampling.picture import check_picture, draw_distributions
    from penstock.data_pipeline.datasets import open_dataset
    from penstock.data_pipeline.datasets.tables import TableColumn

    if picture is not None:
        check_picture(picture)
    names, functions = _metrics(metrics or list(DEFAULT_METRICS), model)
    totals = _functions("--total", total or [], None)
    samples = open_dataset(dataset, length=length, column=column)
    if isinstance(samples, TableColumn) and len(samples) and isinstance(samples[0], str):
        field = "" if samples.column == "text" else f" --field {samples.column}"
        raise ValueError(
            f"{dataset}: column {samples.column!r} holds text, not tokens; tokenize it first: "
            f"penstock tokenize {dataset} PREFIX{field}; or name a column of tokens with --column"
        )
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bars, console=Console(stderr=True), transient=True) as display:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what, total=total)
            display.update(tasks[what], completed=done)

        analyzer = DataAnalyzer(
            samples,
            names,
            output,
            metric_functions=functions,
            total_functions=totals,
            engine=engine.value,
            progress=show,
        )
        found = analyzer.run(resume=resume, overwrite=overwrite)
    if picture is not None:
        draw_distributions(found, picture)
    measured = ", ".join((*found.metrics, *found.totals))
    typer.echo(f"{output}: {measured} of {found.num_samples:,} samples, {found.num_tokens or 0:,} tokens")


def _metrics(wanted: list[str], model: Path | None) -> tuple[list[str], dict[str, Any]]:
    """Names that the analyzer knows, and functions by name for the others."""
    names = [name for name in wanted if name != _LOSS and ":" not in name]
    if model is not None and _LOSS not in wanted:
        raise ValueError(f"--model {model} is for the metric loss: give --metric loss too, or leave --model out")
    return names, _functions("--metric", [name for name in wanted if name == _LOSS or ":" in name], model)


def _functions(option: str, wanted: list[str], model: Path | None) -> dict[str, Any]:
    """Functions by the names under which their numbers are stored."""
    from penstock.data_pipeline.components import import_attribute

    given: dict[str, str] = {}
    functions: dict[str, Any] = {}
    for path in wanted:
        name = path.rpartition(":")[2]
        if name in given:
            raise ValueError(
                f"{option} {given[name]} and {option} {path} would both be stored as {name!r}; name each once, and "
                "give one of two functions another name"
            )
        given[name] = path
        functions[name] = _model_loss(model) if path == _LOSS else import_attribute(path)
    return functions


def _model_loss(model: Path | None) -> Any:
    if model is None:
        raise ValueError("the metric loss needs a model: --model with a run, a checkpoint or a directory")
    from penstock.runtime.model_loss import ModelLoss

    return ModelLoss(model)
