"""``penstock tokenize``."""

import time
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Final, Self

import typer

if TYPE_CHECKING:
    from penstock.data_pipeline.datasets.tokenize_files import TokenizeProgress

_LINE_EVERY_S: Final = 10.0


class SplitChoice(StrEnum):
    """What is one document of a plain text file."""

    FILE = "file"
    PARAGRAPH = "paragraph"
    LINE = "line"


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="JSONL, plain text, Parquet, directories of these, or files' URLs."),
    ],
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="Writes PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", "-t", show_default=False, help="A tokenizer.json; without it one is trained."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", show_default=False, help="Of the tokenizer that is trained; 32,768.")
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Where the text is in JSON objects and Parquet.")] = "text",
    split: Annotated[
        SplitChoice, typer.Option("--split", help="What is one document of a plain text file.")
    ] = SplitChoice.FILE,
    end_of_text: Annotated[
        str, typer.Option("--end-of-text", help="The token that ends every document; '' appends nothing.")
    ] = "<|endoftext|>",
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", show_default=False, help="Processes; one a core unless given.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there, also what was begun with other settings.")
    ] = False,
) -> None:
    """Turn text into a tokenized dataset (.bin/.idx, readable by Megatron too).

    Without --tokenizer a byte-level BPE is trained on the same text and saved as PREFIX.tokenizer.json. If it is cut
    off, the same command goes on from what is finished, in PREFIX.unfinished.

    \b
    Examples:
      penstock tokenize corpus.jsonl data/train --tokenizer tokenizer.json
      penstock tokenize notes/ more.jsonl.zst data/notes --vocab-size 8192
    """
    from penstock.data_pipeline.datasets.tokenize_files import tokenize_files, trained_tokenizer

    with _Display() as display:
        written = tokenize_files(
            sources,
            prefix,
            tokenizer,
            vocab_size=vocab_size,
            field=field,
            split=split.value,
            end_of_text=end_of_text or None,
            workers=workers,
            overwrite=overwrite,
            progress=display.update,
        )
    if tokenizer is None:
        typer.echo(f"{trained_tokenizer(prefix)}: the tokenizer")
    typer.echo(
        f"{prefix}.bin: {written.documents:,} documents, {written.tokens:,} tokens from {written.text_bytes:,} bytes "
        f"({written.text_bytes / written.tokens:.2f} bytes per token) in {written.seconds:.1f} s"
    )


class _Display:
    """Documents, tokens per second and time left: a line kept up to date on a terminal, now and then one elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True)
        bars = Progress(
            BarColumn(bar_width=20), TextColumn("{task.description}"), console=self._console, transient=True
        )
        self._live = bars if self._console.is_terminal else None
        self._task = bars.add_task("reading")
        self._first: TokenizeProgress | None = None
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, now: "TokenizeProgress") -> None:
        """Show how far the work has come."""
        if self._first is None or self._first.what != now.what:
            self._first, self._began = now, time.monotonic()
            self._said = self._began
            if now.what == "encoding" and now.documents:
                self._say(f"going on after {now.documents:,} documents, {now.tokens:,} tokens")
        line = self._line(now, self._first, time.monotonic() - self._began)
        if self._live is not None:
            self._live.update(self._task, description=line, completed=now.read_bytes, total=now.total_bytes)
        elif time.monotonic() - self._said >= _LINE_EVERY_S:
            self._said = time.monotonic()
            self._say(line)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @staticmethod
    def _line(now: "TokenizeProgress", first: "TokenizeProgress", seconds: float) -> str:
        from penstock.runtime.units import duration, quantity

        parts = [now.what, f"{now.documents:,} documents"]
        if now.tokens:
            parts.append(f"{now.tokens:,} tokens")
        read, new = now.read_bytes - first.read_bytes, now.tokens - first.tokens
        if new and seconds > 0:
            parts.append(f"{quantity(new / seconds)} tokens/s")
        if read:
            parts.append(f"{duration((now.total_bytes - now.read_bytes) * seconds / read)} left")
        return "  ".join(parts)
