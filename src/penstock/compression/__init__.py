"""Penstock: compression."""
