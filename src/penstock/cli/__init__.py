"""Penstock: cli."""
