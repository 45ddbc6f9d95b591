"""Cuts the run's global order into one replica's micro-batches.

A step reads the samples at positions ``k .. k + B - 1`` of the order. Micro-batch ``g`` of the global batch holds the
``b`` positions from ``k + g b`` on, and replica ``r`` of ``R`` computes the micro-batches ``r``, ``r + R``, ``r + 2 R``
and so on. So one process that computes them all computes the very same ones, only more of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penstock.data_pipeline.data_sampling import Consumed
from penstock.data_pipeline.datasets import TokenCollator
from penstock.pipe.micro_batch import MicroBatch
from penstock.runtime.feed import Step

Collate = Callable[[list[Any]], tuple[Any, Any]]


class Order(Protocol):
    """Which sample stands at which position; :class:`penstock.data_pipeline.data_sampling.DataSampler` is one."""

    def sample_at(self, k: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Dataset indices of the samples at positions ``k``."""


@dataclass(frozen=True)
class Cut:
    """Which part of every global batch this process computes.

    Attributes:
        micro_batch_size: Rows of a micro-batch.
        micro_batches: Micro-batches per replica and step.
        replica: This replica.
        replicas: All replicas.
        is_first: Whether this process holds the first stage and so needs inputs.
        is_last: Whether it holds the last stage and so needs targets.
        device: Where tensors go.
        counts: Of several ranks that compute the same (those of a ``model`` axis), the one that counts it.
        labels_enter: Whether the first stage gets the targets among its inputs; see :func:`labelled`.
    """

    micro_batch_size: int
    micro_batches: int
    replica: int
    replicas: int
    is_first: bool
    is_last: bool
    device: torch.device
    counts: bool = True
    labels_enter: bool = False

    @property
    def enters(self) -> bool:
        """Whether it is this process that accounts for the samples that its replica reads."""
        return self.is_first and self.counts

    @property
    def global_batch_size(self) -> int:
        """Rows of a global batch."""
        return self.micro_batch_size * self.micro_batches * self.replicas

    def indices(self) -> list[int]:
        """The global indices of this replica's micro-batches, in order."""
        return [self.replica + j * self.replicas for j in range(self.micro_batches)]

    def positions(self, index: int, start: int) -> range:
        """Positions of the rows of global micro-batch ``index`` in a step that begins at position ``start``."""
        first = start + index * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


def from_order(dataset: Any, order: Order, collate: Collate, cut: Cut, step: Step) -> tuple[list[MicroBatch], Consumed]:
    """This replica's micro-batches of a step, read from a map-style dataset.

    Ranks without the first or the last stage read nothing.

    Returns:
        The micro-batches, and an account of the samples that they hold; of two stages that read the same, the first has
        it.
    """
    micro_batches = []
    read = Consumed()
    for index in cut.indices():
        planned = step.batches[index]
        inputs: Any = None
        targets: Any = None
        if cut.is_first or cut.is_last:
            rows = order.sample_at(planned.positions)
            inputs, targets = collate([dataset[int(row)] for row in rows])
            if cut.enters and planned.weight:
                read.enter(np.arange(planned.first, planned.first + len(rows)), rows)
        positions = tuple(planned.positions.tolist())
        micro_batches.append(_micro_batch(inputs, targets, index, positions, cut, planned.weight))
    return micro_batches, read


def from_iterator(data_iter: Iterator[Any], cut: Cut, start: int, *, targets_needed: bool = True) -> list[MicroBatch]:
    """The next micro-batches of a user's iterator, which yields this replica's ``(inputs, targets)`` pairs.

    Ranks without the first or the last stage leave the iterator alone; the first and the last stage of a replica must
    be given the same data.

    Raises:
        ValueError: The iterator ends early or yields something else.
    """
    if not isinstance(data_iter, Iterator):
        raise ValueError(
            f"data_iter must be an iterator, got a {type(data_iter).__name__}; "
            "make one with iter(...), once, and give it to every call"
        )
    micro_batches = []
    for number, index in enumerate(cut.indices()):
        inputs: Any = None
        targets: Any = None
        if cut.is_first or cut.is_last:
            try:
                item = next(data_iter)
            except StopIteration:
                raise ValueError(
                    f"the data iterator of replica {cut.replica} ended after {number} of the {cut.micro_batches} "
                    "micro-batches of a step; give it more data, or an iterator that starts over"
                ) from None
            inputs, targets = split_pair(item, targets_needed=targets_needed)
        rows = _rows(inputs)
        first = start + index * cut.micro_batch_size
        positions = tuple(range(first, first + (cut.micro_batch_size if rows is None else rows)))
        micro_batches.append(_micro_batch(inputs, targets, index, positions, cut))
    return micro_batches


def split_pair(item: Any, *, targets_needed: bool = True) -> tuple[Any, Any]:
    """Take an ``(inputs, targets)`` pair apart; where no targets are needed anything else is inputs alone."""
    if isinstance(item, tuple | list) and len(item) == 2:
        return _plain_dict(item[0]), item[1]
    if not targets_needed:
        return _plain_dict(item), None
    found = type(item).__name__ + (f" of {len(item)}" if isinstance(item, tuple | list | dict) else "")
    raise ValueError(
        f"a batch must be a pair (inputs, targets), got a {found}; "
        "put everything that the first layer takes into inputs, as a tuple or dict if it is several tensors"
    )


def collate_samples(
    samples: list[Any], *, targets_needed: bool = True, multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Stack samples into ``(inputs, targets)``.

    One-dimensional integer samples are tokens of one length ``S + 1``: inputs are the first ``S`` and labels the last
    ``S``, int64 ``[B, S]``. With ``multiple_of`` they may differ in length, and are padded to such a multiple. Anything
    else must be a pair, stacked by torch's default collation; where no targets are needed, what is no pair is inputs
    alone.
    """
    first = samples[0]
    if _is_tokens(first):
        if multiple_of is not None:
            return TokenCollator(multiple_of=multiple_of)(samples)
        lengths = {len(sample) for sample in samples}
        if len(lengths) > 1:
            raise ValueError(
                f"samples of different lengths ({min(lengths)} to {max(lengths)} tokens) cannot be stacked; "
                "give training_data whose rows are windows of one length, or cut by process_dataset(data, transform)"
            )
        return TokenCollator()(samples)
    return split_pair(torch.utils.data.default_collate(samples), targets_needed=targets_needed)


def labelled(inputs: Any, targets: Any) -> Any:
    """Token ids, or a dict with them, as a dict that has the labels too, for a first layer that takes them.

    Raises:
        ValueError: The inputs are something else.
    """
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs}
    if not isinstance(inputs, dict):
        raise ValueError(
            f"the model's first layer takes labels among its inputs, so these must be token ids or a dict, but a batch "
            f"has a {type(inputs).__name__}; give dicts, or a model whose vocabulary is whole (vocabulary_parts=1)"
        )
    return {**inputs, "labels": targets}


def tokens_in(inputs: Any) -> int:
    """Tokens of a micro-batch: elements of the first integer tensor of at least two dimensions, else rows."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if tensor.dim() >= 2 and not tensor.is_floating_point():
            return tensor.shape[0] * tensor.shape[1]
    return _rows(inputs) or 0


def _plain_dict(value: Any) -> Any:
    """Batches of Hugging Face tokenizers are mappings but no dicts, which nothing here would look into."""
    return dict(value) if isinstance(value, Mapping) else value


def _is_tokens(sample: Any) -> bool:
    if isinstance(sample, Tensor):
        return sample.dim() == 1 and not sample.is_floating_point()
    return isinstance(sample, np.ndarray) and sample.ndim == 1 and np.issubdtype(sample.dtype, np.integer)


def _rows(inputs: Any) -> int | None:
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return None


def _micro_batch(
    inputs: Any, targets: Any, index: int, positions: Sequence[int], cut: Cut, weight: float = 1.0
) -> MicroBatch:
    if cut.labels_enter and cut.is_first:
        inputs = labelled(inputs, targets)
    return MicroBatch(
        inputs=_to(inputs, cut.device) if cut.is_first else None,
        targets=_to(targets, cut.device) if cut.is_last else None,
        index=index,
        positions=tuple(positions),
        weight=weight,
    )


def _to(value: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)
