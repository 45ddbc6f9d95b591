"""Fewer bytes between replicas: compressors with a memory, the collectives and optimizers that use them.

An algorithm turns a tensor into a payload of known size; error feedback carries what it leaves out over to the next
step; :func:`compressed_allreduce`, :class:`Reducer`, the DDP hook and :class:`OneBitAdam` take any of them.
"""

from typing import TYPE_CHECKING, Any

from penstock.compression.algorithm import CompressionAlgorithm, Payload, PayloadField
from penstock.compression.collectives import CompressedWork, compressed_allreduce, start_compressed_allreduce
from penstock.compression.config import CompressionConfig
from penstock.compression.ddp_hook import DDPCompression, ddp_compression_hook
from penstock.compression.error_feedback import ErrorFeedback
from penstock.compression.error_memory import ErrorMemory
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

if TYPE_CHECKING:
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
    "LocalGradients",
    "LocalSGD",
    "LocalUpdates",
    "MuLoCo",
    "MuonAdamW",
    "OneBitAdam",
    "OneBitLamb",
    "OuterStep",
    "Payload",
    "PayloadField",
    "Reducer",
    "SparseLoCo",
    "StreamingDiLoCo",
    "ZeroOneAdam",
    "compressed_allreduce",
    "create_compression_algorithm",
    "ddp_compression_hook",
    "get_compression_class",
    "get_compression_module",
    "initialize_module",
    "known_algorithms",
    "main",
    "register_compression_module",
    "start_compressed_allreduce",
]


def __getattr__(name: str) -> Any:
    """Import the command-line tool when it is first asked for: a training run needs none of it."""
    if name == "main":
        from penstock.compression.tool import main

        return main
    raise AttributeError(f"module 'penstock.compression' has no attribute {name!r}")
