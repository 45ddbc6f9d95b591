"""Which samples, in which order: indexed datasets, difficulty, schedules and the sampler."""

from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.indexed_builder import IndexedDatasetBuilder

__all__ = ["IndexedDataset", "IndexedDatasetBuilder"]
