"""Error text for a name that is not known: lists the known ones and points at the nearest."""

import difflib
from collections.abc import Iterable
from typing import Final

_MOST: Final = 30
"""Names that are listed; a large model has thousands of modules."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """A sentence such as ``unknown algorithm 'onebt'; did you mean 'onebit'? Known: bf16, fp16, none, onebit``."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    more = f", ... and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(names[:_MOST]) or '(none)'}{more}"
