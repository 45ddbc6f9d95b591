"""Penstock: runtime."""
