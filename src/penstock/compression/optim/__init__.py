"""Penstock: compression/optim."""
