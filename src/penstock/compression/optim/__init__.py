"""Optimizers that communicate by themselves."""

from penstock.compression.optim.onebit_adam import OneBitAdam

__all__ = ["OneBitAdam"]
