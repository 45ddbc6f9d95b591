"""Replicas that train apart and meet now and then."""

from penstock.compression.local.local_updates import LocalUpdates
from penstock.compression.local.methods import DiLoCo, LocalSGD, MuLoCo, SparseLoCo, StreamingDiLoCo
from penstock.compression.local.outer_step import OuterStep

__all__ = ["DiLoCo", "LocalSGD", "LocalUpdates", "MuLoCo", "OuterStep", "SparseLoCo", "StreamingDiLoCo"]
