"""``penstock tokenize``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class SplitChoice(StrEnum):
    """What is one document of a plain text file."""

    FILE = "file"
    PARAGRAPH = "paragraph"
    LINE = "line"


def tokenize(
    source: Annotated[
        str, typer.Argument(metavar="TEXT", help="JSONL, plain text, Parquet, a directory of these, or a file's URL.")
    ],
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="Writes PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", "-t", show_default=False, help="A tokenizer.json; without it one is trained."),
    ] = None,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Of the tokenizer that is trained.")] = 32_768,
    field: Annotated[str, typer.Option("--field", help="Where the text is in JSON objects and Parquet.")] = "text",
    split: Annotated[
        SplitChoice, typer.Option("--split", help="What is one document of a plain text file.")
    ] = SplitChoice.FILE,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the dataset and the tokenizer if they are there.")
    ] = False,
) -> None:
    """Turn text into a tokenized dataset (.bin/.idx, readable by Megatron too).

    Without --tokenizer a byte-level BPE is trained on the same text and saved as PREFIX.tokenizer.json.

    \b
    Examples:
      penstock tokenize corpus.jsonl data/train --tokenizer tokenizer.json
      penstock tokenize notes/ data/notes --vocab-size 8192
    """
    from rich.console import Console

    from penstock.data_pipeline.datasets.text import read_texts
    from penstock.data_pipeline.datasets.tokenize import (
        load_tokenizer,
        save_tokenizer,
        tokenize_to_indexed,
        train_bpe,
    )

    saved = prefix.with_name(prefix.name + ".tokenizer.json")
    targets = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), *([saved] if tokenizer is None else [])]
    there = [str(target) for target in targets if target.exists()]
    if there and not overwrite:
        raise ValueError(f"{', '.join(there)}: there already; give --overwrite to replace, or another PREFIX")
    console = Console(stderr=True)
    if tokenizer is None:
        with console.status("training a tokenizer"):
            encoder = train_bpe(read_texts(source, field=field, split=split.value), vocab_size=vocab_size)
        save_tokenizer(encoder, saved)
        typer.echo(f"{saved}: {encoder.get_vocab_size():,} tokens in the vocabulary")
    else:
        encoder = load_tokenizer(tokenizer)
    with console.status("encoding") as status:
        written = tokenize_to_indexed(
            read_texts(source, field=field, split=split.value),
            encoder,
            prefix,
            progress=lambda documents, tokens: status.update(f"{documents:,} documents, {tokens:,} tokens"),
        )
    typer.echo(
        f"{prefix}.bin: {written.documents:,} documents, {written.tokens:,} tokens from {written.text_bytes:,} bytes "
        f"({written.text_bytes / written.tokens:.2f} bytes per token) in {written.seconds:.1f} s"
    )
