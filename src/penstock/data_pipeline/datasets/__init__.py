"""Penstock: data_pipeline/datasets."""
