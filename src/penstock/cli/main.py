"""``penstock <verb>``: the command line. Verbs parse, call and print; each imports what it needs when it runs."""

import os
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from penstock._version import __version__
from penstock.cli.analyze import analyze
from penstock.cli.compress import compress
from penstock.cli.datasets import merge, split
from penstock.cli.evaluate import evaluate
from penstock.cli.inspect import inspect
from penstock.cli.network import network
from penstock.cli.order import order
from penstock.cli.plan import plan
from penstock.cli.schedule import schedule
from penstock.cli.tokenize import tokenize
from penstock.cli.train import train

_WRONG_INPUT: Final = 2
_DEBUG: Final = "PENSTOCK_DEBUG"


class _FriendlyGroup(TyperGroup):
    """Turns what a user can mend (a wrong value, a missing file) into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            # A system error that names no file (a broken pipe, a lost connection) is not the user's to mend.
            nameless = isinstance(error, OSError) and error.filename is None
            if nameless or ctx.params.get("debug"):
                raise
            typer.echo(typer.style(f"error: {_sentence(error)}", fg=typer.colors.RED), err=True)
            raise typer.Exit(_WRONG_INPUT) from None


app = typer.Typer(
    cls=_FriendlyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (train, evaluate, inspect, tokenize, merge, split, analyze, order, schedule, plan, compress, network):
    app.command(name="eval" if verb is evaluate else None)(verb)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar=_DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    """Train transformers on fewer samples, fewer tokens, fewer bytes and fewer idle seconds.

    \b
    Example: penstock train --output runs/demo
    """
    if debug:
        os.environ[_DEBUG] = "1"  # for the processes that a verb launches


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(app(prog_name="penstock"))


def _sentence(error: ValueError | OSError) -> str:
    """What to print of an error; notes say where in the run it happened."""
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return "\n  ".join([text, *getattr(error, "__notes__", ())])
