"""From what a sampler is given to a dataset whose samples have numbers."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset

from penstock.data_pipeline.data_sampling.config import SamplingConfig
from penstock.data_pipeline.datasets.corpora import Corpora
from penstock.data_pipeline.datasets.open import open_dataset


def open_source(source: Any, config: SamplingConfig) -> Any:
    """Open a data source, or each corpus of a mixture.

    Args:
        source: See :class:`DataSampler`.
        config: Which column of a table, how windows are cut, whether there is a mixture.

    Returns:
        A map-style dataset: ``data[i]`` is a sample and ``len(data)`` their number.

    Raises:
        ValueError: The source is not understood, or can only be iterated.
    """

    def opened(part: Any) -> Any:
        return open_dataset(part, length=config.length, stride=config.stride, column=config.column)

    if config.mixture is not None and isinstance(source, Mapping):
        return Corpora({str(name): opened(part) for name, part in source.items()})
    data = opened(source)
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(
            f"{type(data).__name__} can only be iterated, but an order needs samples by number: give a dataset "
            "with __len__ and __getitem__ (a list of its samples, for example)"
        )
    if getattr(data, "ndim", 1) == 0:
        raise ValueError(f"the data source is a single {data.dtype} number; give a list or array of samples")
    if isinstance(data, Mapping):
        raise ValueError("the data source is a table of names; give its samples as a list, or an Arrow table")
    return data
