"""Penstock: data_pipeline/random_ltd."""
