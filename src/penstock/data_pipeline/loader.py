"""From a dataset to batches: a torch DataLoader, with a sampler that decides the order where one is configured."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from penstock._core.suggest import unknown_name
from penstock.data_pipeline.components import build_function
from penstock.data_pipeline.configuration import validate_config
from penstock.data_pipeline.datasets.collate import TokenCollator
from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.open import open_dataset
from penstock.data_pipeline.datasets.windows import TokenWindows
from penstock.data_pipeline.settings import LoaderConfig

if TYPE_CHECKING:
    from penstock.data_pipeline.data_sampling import DataSampler

_PARAMETERS: Final = tuple(name for name in inspect.signature(DataLoader.__init__).parameters if name != "self")
_DECIDE_THE_ORDER: Final = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")


class MappedDataset:
    """A map-style dataset whose samples go through functions when they are read.

    Args:
        dataset: Anything with ``__getitem__`` and ``__len__``.
        transforms: Applied to each sample, in order.
    """

    def __init__(self, dataset: Any, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.dataset = dataset
        self.transforms = tuple(transforms)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _through(self.dataset[index], self.transforms)


class StreamedDataset(IterableDataset[Any]):
    """An iterable as torch wants it: each worker takes every so-many-th sample, so that none comes twice.

    Args:
        source: Iterated anew for each pass.
        transforms: Applied to each sample, in order.
    """

    def __init__(self, source: Iterable[Any], transforms: Sequence[Callable[[Any], Any]] = ()) -> None:
        self.source = source
        self.transforms = tuple(transforms)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        mine: Iterable[Any] = self.source
        # A user's own IterableDataset divides its samples itself, as torch asks of it.
        if worker is not None and not isinstance(self.source, IterableDataset):
            mine = itertools.islice(self.source, worker.id, None, worker.num_workers)
        return (_through(sample, self.transforms) for sample in mine)


class PreprocessedCollate:
    """A batch's samples through a sampler's transforms, then collated; a transform such as ``pack`` sees the batch.

    Args:
        preprocess: From a list of samples to a list of samples.
        collate: Makes the batch; None for torch's own.
    """

    def __init__(
        self, preprocess: Callable[[list[Any]], list[Any]], collate: Callable[[Any], Any] | None = None
    ) -> None:
        self.preprocess = preprocess
        self.collate = default_collate if collate is None else collate

    def __call__(self, samples: Iterable[Any]) -> Any:
        """The batch that the transformed samples make."""
        return self.collate(self.preprocess(list(samples)))


def _through(sample: Any, transforms: Iterable[Callable[[Any], Any]]) -> Any:
    for transform in transforms:
        sample = transform(sample)
    return sample


def process_dataset(
    dataset: Any,
    transform: Any = None,
    *,
    length: int | None = None,
    stride: int | None = None,
    column: str | None = None,
) -> Any:
    """Open a dataset and put transforms in front of it.

    Args:
        dataset: A path or an object; see :func:`penstock.data_pipeline.datasets.open_dataset`, also for ``length``,
            ``stride`` and ``column``.
        transform: None, one transform, or a list of them: callables, registered names, ``{"name": ..., **arguments}``.

    Returns:
        A dataset that torch's DataLoader takes: map-style where there are indices, else an ``IterableDataset``.
    """
    opened = open_dataset(dataset, length=length, stride=stride, column=column)
    wanted = transform if isinstance(transform, list | tuple) else [] if transform is None else [transform]
    functions = [build_function("transform", entry) for entry in wanted]
    if isinstance(opened, IterableDataset) or not _is_map_style(opened):
        ready = isinstance(opened, IterableDataset) and not functions
        return opened if ready else StreamedDataset(opened, functions)
    return MappedDataset(opened, functions) if functions else opened


def setup_sampler(dataset: Any, sampling_config: Mapping[str, Any]) -> "DataSampler":
    """A :class:`DataSampler` over a dataset, for use as a DataLoader's batch sampler.

    Args:
        dataset: A map-style dataset.
        sampling_config: The sampler's configuration; ``batch_size`` is the global batch.

    Raises:
        ValueError: The dataset has no indices to choose from, or the configuration is wrong.
    """
    if isinstance(dataset, IterableDataset) or not _is_map_style(dataset):
        raise ValueError(
            "sampling chooses samples by index, but this dataset can only be read in its own order; write it to an "
            "indexed file first, or leave out sampling"
        )
    from penstock.data_pipeline.data_sampling import DataSampler

    return DataSampler(dataset, dict(sampling_config))


def create_data_loader(dataset: Any, config: LoaderConfig | Mapping[str, Any] | None = None) -> DataLoader[Any]:
    """Make a torch DataLoader from a dataset or a path.

    Args:
        dataset: A dataset object, or a path to a ``.bin/.idx`` pair, Parquet, Arrow, JSON lines or ``.npy``.
        config: A :class:`LoaderConfig` or the same as a dictionary. ``data_loader_params`` go to torch's DataLoader;
            with ``sampling``, a :class:`DataSampler` is its batch sampler, whose transforms see each batch's samples
            before they are collated.

    Returns:
        The loader. Over tokens (an indexed dataset, windows, a column of token lists, without a transform) its batches
        are ``(input_ids, labels)``, both int64; over anything else what torch's collating makes of the samples.

    Raises:
        ValueError: The dataset cannot be opened, a parameter is unknown, or two of them contradict each other.
    """
    settings = validate_config(LoaderConfig, {} if config is None else config, "data loader configuration")
    parameters = dict(settings.data_loader_params)
    _check_parameters(parameters, sampled=settings.sampling is not None, collated=settings.collate is not None)
    processed = process_dataset(
        dataset, settings.transform, length=settings.length, stride=settings.stride, column=settings.column
    )
    sampler = None
    if settings.sampling is not None:
        sampler = parameters["batch_sampler"] = setup_sampler(processed, settings.sampling)
        processed = sampler.data  # it may have cut the stream into windows
    elif isinstance(processed, IterableDataset):
        for name in ("shuffle", "sampler", "batch_sampler"):
            if parameters.get(name):
                raise ValueError(f"data_loader_params.{name} chooses samples by index, but this dataset has none")
    if "collate_fn" not in parameters:
        parameters["collate_fn"] = _collate(processed, settings.collate)
    if sampler is not None and sampler.transforms:
        parameters["collate_fn"] = PreprocessedCollate(sampler.transforms, parameters["collate_fn"])
    if settings.seed is not None:
        if "generator" in parameters:
            raise ValueError("seed and data_loader_params.generator both say where randomness comes from; keep one")
        parameters["generator"] = torch.Generator().manual_seed(settings.seed)
    try:
        return DataLoader(processed, **parameters)
    except (ValueError, TypeError) as error:
        raise ValueError(f"data_loader_params: {error}") from None


def _check_parameters(parameters: Mapping[str, Any], *, sampled: bool, collated: bool) -> None:
    for name in parameters:
        if name not in _PARAMETERS:
            raise ValueError(f"data_loader_params: {unknown_name('parameter', name, _PARAMETERS)}")
    if "dataset" in parameters:
        raise ValueError("data_loader_params.dataset: the dataset is create_data_loader's first argument; remove it")
    if collated and "collate_fn" in parameters:
        raise ValueError("collate and data_loader_params.collate_fn both say how to collate; keep one")
    # A false shuffle or drop_last says nothing that the others contradict.
    given = {name for name in _DECIDE_THE_ORDER if parameters.get(name) not in (None, False)}
    if sampled and given:
        names = ", ".join(sorted(given))
        raise ValueError(
            f"data_loader_params ({names}) and sampling both decide what is in a batch; remove them here and set "
            "batch_size, drop_last and strategy in sampling"
        )
    if "batch_sampler" in given and len(given) > 1:
        others = ", ".join(sorted(given - {"batch_sampler"}))
        raise ValueError(f"data_loader_params.batch_sampler makes whole batches, so {others} must be left out")
    if {"sampler", "shuffle"} <= given:
        raise ValueError("data_loader_params.sampler decides the order, so shuffle must be left out")


def _collate(dataset: Any, wanted: Any) -> Callable[[Any], Any] | None:
    if wanted is None:
        from penstock.data_pipeline.datasets.tables import TableColumn

        tokens = isinstance(dataset, IndexedDataset | TokenWindows)
        return TokenCollator() if tokens or (isinstance(dataset, TableColumn) and dataset.is_tokens) else None
    return None if wanted == "default" else build_function("collate", wanted)


def _is_map_style(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
