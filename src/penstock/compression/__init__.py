"""Fewer bytes between replicas: compressors with a memory, the collectives and optimizers that use them.

An algorithm turns a tensor into a payload of known size; error feedback carries what it leaves out over to the next
step; :func:`compressed_allreduce`, :class:`Reducer`, the DDP hook and :class:`OneBitAdam` take any of them.
"""

from typing import TYPE_CHECKING, Any

from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField
from penstock.compression.collectives import CompressedWork, compressed_allreduce, start_compressed_allreduce
from penstock.compression.config import CompressionConfig
from penstock.compression.ddp_hook import DDPCompression, ddp_compression_hook
from penstock.compression.error_feedback import ErrorFeedback, FeedbackRule
from penstock.compression.error_memory import ErrorMemory
from penstock.compression.hierarchy import machine_groups
from penstock.compression.local import DiLoCo, LocalSGD, LocalUpdates, MuLoCo, OuterStep, SparseLoCo, StreamingDiLoCo
from penstock.compression.local_gradients import LocalGradients
from penstock.compression.module import CompressionModule, initialize_module
from penstock.compression.optim import DeMo, MuonAdamW, OneBitAdam, OneBitLamb, ZeroOneAdam
from penstock.compression.reducer import Reducer
from penstock.compression.registry import (
    create_compression_algorithm,
    get_compression_class,
    get_compression_module,
    known_algorithms,
    register_compression_module,
)
from penstock.compression.rules import ParameterRules

if TYPE_CHECKING:
    from penstock.compression.sharded import compress_fsdp
    from penstock.compression.tool import main

__all__ = [
    "CompressedWork",
    "CompressionAlgorithm",
    "CompressionConfig",
    "CompressionModule",
    "DDPCompression",
    "DeMo",
    "DiLoCo",
    "ErrorFeedback",
    "ErrorMemory",
    "FeedbackRule",
    "LocalGradients",
    "LocalSGD",
    "LocalUpdates",
    "MuLoCo",
    "MuonAdamW",
    "OneBitAdam",
    "OneBitLamb",
    "OuterStep",
    "ParameterRules",
    "Payload",
    "PayloadField",
    "Reducer",
    "SparseLoCo",
    "StreamingDiLoCo",
    "ZeroOneAdam",
    "compress_fsdp",
    "compressed_allreduce",
    "create_compression_algorithm",
    "ddp_compression_hook",
    "get_compression_class",
    "get_compression_module",
    "initialize_module",
    "known_algorithms",
    "machine_groups",
    "main",
    "register_compression_module",
    "start_compressed_allreduce",
]


def __getattr__(name: str) -> Any:
    """Import what few runs need when it is first asked for: the command-line tool, and what belongs to FSDP2."""
    if name == "main":
        from penstock.compression.tool import main

        return main
    if name == "compress_fsdp":
        from penstock.compression.sharded import compress_fsdp

        return compress_fsdp
    raise AttributeError(f"module 'penstock.compression' has no attribute {name!r}")
