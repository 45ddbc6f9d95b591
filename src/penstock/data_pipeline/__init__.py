"""Penstock: data_pipeline."""
