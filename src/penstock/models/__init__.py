"""Penstock: models."""
