"""Penstock trains transformers on fewer samples, fewer tokens, fewer bytes and fewer idle seconds.

The four parts live in :mod:`penstock.data_pipeline.data_sampling` (samples),
:mod:`penstock.data_pipeline.random_ltd` (tokens), :mod:`penstock.compression` (bytes) and
:mod:`penstock.pipe` (idle time). Each works alone; :func:`penstock.initialize` composes them into one run.
"""

from typing import TYPE_CHECKING, Any

from penstock._version import __version__

if TYPE_CHECKING:
    from penstock.runtime.initialize import initialize

__all__ = ["__version__", "initialize"]


def __getattr__(name: str) -> Any:
    """Import :func:`initialize` when it is first asked for, so that ``import penstock`` stays cheap."""
    if name == "initialize":
        from penstock.runtime.initialize import initialize

        return initialize
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
