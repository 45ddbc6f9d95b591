"""``penstock merge`` and ``penstock split``."""

from pathlib import Path
from typing import Annotated

import typer

_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Datasets of .bin/.idx, of one dtype.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PREFIX", help="Where the result goes.")],
    overwrite: _Overwrite = False,
) -> None:
    """Write several tokenized datasets one after another into one.

    \b
    Example: penstock merge data/a data/b --output data/all
    """
    from penstock.data_pipeline.datasets.rearrange import merge_indexed

    merged = merge_indexed(sources, output, overwrite=overwrite)
    typer.echo(f"{output}.bin: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens")


def split(
    source: Annotated[Path, typer.Argument(metavar="PREFIX", help="A dataset of .bin/.idx.")],
    outputs: Annotated[
        list[str],
        typer.Option("--part", "-p", metavar="PREFIX=SHARE", help="A part and its share of the tokens. Repeatable."),
    ],
    overwrite: _Overwrite = False,
) -> None:
    """Cut a tokenized dataset between documents into parts, in order.

    \b
    Example: penstock split data/all --part data/train=98 --part data/heldout=2
    """
    from penstock.data_pipeline.datasets.rearrange import split_indexed

    prefixes, shares = [], []
    for part in outputs:
        prefix, equals, share = part.rpartition("=")
        try:
            shares.append(float(share))
        except ValueError:
            equals = ""
        if not equals or not prefix:
            raise ValueError(f"--part {part!r} is not of the form PREFIX=SHARE, for example data/heldout=2")
        prefixes.append(prefix)
    for prefix, made in zip(prefixes, split_indexed(source, prefixes, shares, overwrite=overwrite), strict=True):
        typer.echo(f"{prefix}.bin: {made.num_documents:,} documents, {made.num_tokens:,} tokens")
