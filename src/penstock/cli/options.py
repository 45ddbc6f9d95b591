"""Options that several verbs share."""

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value of the configuration: train.steps=100. Repeatable."
    ),
]
