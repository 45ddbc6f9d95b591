"""``penstock analyze``."""

from pathlib import Path
from typing import Annotated

import typer


def analyze(
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="PREFIX of .bin/.idx, Parquet or JSONL of tokens, or .npy.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory for the analysis.")],
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", "-m", metavar="NAME", help="seqlen or vocabularyrarity. Repeatable; without it, both."
        ),
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
) -> None:
    """Measure the difficulty of every sample, for a curriculum.

    \b
    Examples:
      penstock analyze data/train data/train-difficulty --length 256
      penstock analyze tokens.parquet difficulty --metric seqlen --column input_ids
    """
    from rich.console import Console

    from penstock.data_pipeline.data_sampling.analyzer import KNOWN_METRICS, DataAnalyzer
    from penstock.data_pipeline.datasets import open_dataset
    from penstock.data_pipeline.datasets.tables import TableColumn

    samples = open_dataset(dataset, length=length, column=column)
    if isinstance(samples, TableColumn) and len(samples) and isinstance(samples[0], str):
        field = "" if samples.column == "text" else f" --field {samples.column}"
        raise ValueError(
            f"{dataset}: column {samples.column!r} holds text, not tokens; tokenize it first: "
            f"penstock tokenize {dataset} PREFIX{field}; or name a column of tokens with --column"
        )
    with Console(stderr=True).status("analyzing") as status:

        def show(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {done:,} of {total:,} samples")

        found = DataAnalyzer(samples, metrics or KNOWN_METRICS, output, progress=show).run()
    typer.echo(f"{output}: {', '.join(found.metrics)} of {found.num_samples:,} samples, {found.num_tokens:,} tokens")
