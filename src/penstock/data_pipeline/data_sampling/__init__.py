"""Which samples, in which order: indexed datasets, difficulty, schedules and the sampler."""

from penstock.data_pipeline.data_sampling.analysis import Analysis
from penstock.data_pipeline.data_sampling.analyzer import DataAnalyzer
from penstock.data_pipeline.data_sampling.config import SamplingConfig
from penstock.data_pipeline.data_sampling.consumed import Consumed
from penstock.data_pipeline.data_sampling.curriculum import CurriculumScheduler
from penstock.data_pipeline.data_sampling.deepspeed_files import read_deepspeed, write_deepspeed
from penstock.data_pipeline.data_sampling.sampler import DataSampler
from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.indexed_builder import IndexedDatasetBuilder

__all__ = [
    "Analysis",
    "Consumed",
    "CurriculumScheduler",
    "DataAnalyzer",
    "DataSampler",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "SamplingConfig",
    "read_deepspeed",
    "write_deepspeed",
]
