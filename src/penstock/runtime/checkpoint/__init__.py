"""Checkpoints: a directory per step, keyed by canonical layers, complete only once its manifest is written.

::

    checkpoints/step_00000200/
        layer_000.safetensors           weights and moments of canonical layer 0, whatever stage it lay on
        layer_001.safetensors
        errors_rank_000.safetensors     what belongs to a rank and not to a layer: error memories
        state.json                      step, tokens, sampler, ledger
        manifest.json                   sizes and SHA-256 of all the above; written last

Each rank writes its own files into ``step_00000200.partial``; when all are known to be on disk, one rank *seals* it:
writes the manifest and renames the directory. A run killed at any moment before leaves a partial directory, which
:func:`latest_complete` passes over, and former checkpoints as they were. Nothing is unpickled.
"""

from penstock.runtime.checkpoint.names import STATE_NAME, layer_file, rank_file, step_name
from penstock.runtime.checkpoint.reader import Checkpoint, copy_into
from penstock.runtime.checkpoint.store import Entry, latest_complete, list_checkpoints, prune
from penstock.runtime.checkpoint.writer import CheckpointWriter

__all__ = [
    "STATE_NAME",
    "Checkpoint",
    "CheckpointWriter",
    "Entry",
    "copy_into",
    "latest_complete",
    "layer_file",
    "list_checkpoints",
    "prune",
    "rank_file",
    "step_name",
]
