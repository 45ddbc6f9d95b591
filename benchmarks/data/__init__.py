"""Benchmarks of the data room, each beside its peer."""
