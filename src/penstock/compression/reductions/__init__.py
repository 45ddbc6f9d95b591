"""The ways in which a flat buffer is summed over a group, by the kind of algorithm."""

from penstock.compression.reductions.base import LocalReduction, Reduction, StagedReduction, Wires
from penstock.compression.reductions.gather import GatherReduction
from penstock.compression.reductions.hierarchical import HierarchicalReduction
from penstock.compression.reductions.linear import LinearReduction
from penstock.compression.reductions.low_rank import LowRankReduction
from penstock.compression.reductions.two_phase import TwoPhaseReduction

__all__ = [
    "GatherReduction",
    "HierarchicalReduction",
    "LinearReduction",
    "LocalReduction",
    "LowRankReduction",
    "Reduction",
    "StagedReduction",
    "TwoPhaseReduction",
    "Wires",
]
