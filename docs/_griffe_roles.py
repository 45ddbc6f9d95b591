"""Turns reStructuredText roles in docstrings (``:class:`X```) into plain code, which Markdown shows as it should."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:py:)?(?:class|func|meth|mod|attr|data|exc):`(~?)([^`]+)`")


def _code(found: re.Match[str]) -> str:
    short, target = found.groups()
    return f"`{target.rpartition('.')[2] if short else target}`"


class Roles(griffe.Extension):
    """Rewrites each docstring once, when it is collected."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_code, obj.docstring.value)
