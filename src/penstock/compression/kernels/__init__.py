"""Compression in the fewest passes over memory, where something is at hand that can compile it."""

from penstock.compression.kernels.choice import BlockKernels, kernels_for, use_kernels

__all__ = ["BlockKernels", "kernels_for", "use_kernels"]
