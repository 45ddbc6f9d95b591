"""One script per claim, each beside its peer in the same run; results are committed in ``results/``."""
