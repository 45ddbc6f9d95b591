"""Leaves out of the site what is for readers of the files: a README's text stands in the page itself there."""

import re
from typing import Any

_NOTE = re.compile(r"^In the repository [^\n]*\n\[[^\n]*\]\(\.\./README\.md#[^\n]*\n+", re.MULTILINE)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """The page without these notes."""
    return _NOTE.sub("", markdown)
