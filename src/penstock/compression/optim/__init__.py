"""Optimizers that communicate by themselves."""

from penstock.compression.optim.demo import DeMo
from penstock.compression.optim.muon_adamw import MuonAdamW
from penstock.compression.optim.onebit_adam import OneBitAdam
from penstock.compression.optim.onebit_lamb import OneBitLamb
from penstock.compression.optim.zero_one_adam import ZeroOneAdam

__all__ = ["DeMo", "MuonAdamW", "OneBitAdam", "OneBitLamb", "ZeroOneAdam"]
