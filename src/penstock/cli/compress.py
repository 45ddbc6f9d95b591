"""``penstock compress``."""

from pathlib import Path
from typing import Annotated

import typer


def compress(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file.")],
    algorithms: Annotated[
        list[str] | None, typer.Option("--algorithm", "-a", metavar="NAME", help="Repeatable; without it, all.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Of the algorithm. Repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default=False, help="Write the compressed (or decompressed) tensors here."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", show_default=False, help="Draw error against ratio (.png, .svg, .pdf).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if there is one.")] = False,
    decompress: Annotated[bool, typer.Option("--decompress", help="Turn a compressed file back.")] = False,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="Measure tensor by tensor, not as one.")] = False,
) -> None:
    """Compress the tensors of a safetensors file; report ratio, error, contraction and time.

    \b
    Examples:
      penstock compress model.safetensors
      penstock compress model.safetensors -a onebit --option block_size=4096 -o small.safetensors
      penstock compress small.safetensors --decompress -o back.safetensors
    """
    from penstock.compression.tool import app_function, parse_option

    code = app_function(
        file,
        algorithms=list(algorithms or ()),
        options=dict(parse_option(text) for text in options or ()),
        output=output,
        picture=plot,
        decompress=decompress,
        fused=not per_tensor,
        overwrite=overwrite,
    )
    if code:
        raise typer.Exit(code)
