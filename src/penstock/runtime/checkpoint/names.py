"""Names of the files of a checkpoint."""

from typing import Final

STATE_NAME: Final = "state.json"
FORMAT: Final = "penstock-checkpoint"
FORMAT_VERSION: Final = 1
PARTIAL: Final = ".partial"
"""Ends the name of a directory that is being written."""
REPLACED: Final = ".replaced"
"""Ends the name of a complete checkpoint that gives way to a new one of the same step."""


def step_name(step: int) -> str:
    """Name of a step's directory, ``step_00000200``; names sort as the steps do."""
    return f"step_{step:08d}"


def layer_file(layer: int) -> str:
    """Name of a canonical layer's file, ``layer_003.safetensors``."""
    return f"layer_{layer:03d}.safetensors"


def rank_file(rank: int) -> str:
    """Name of the file of what belongs to a rank, ``errors_rank_000.safetensors``."""
    return f"errors_rank_{rank:03d}.safetensors"
