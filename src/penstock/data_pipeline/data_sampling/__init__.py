"""Penstock: data_pipeline/data_sampling."""
