"""``penstock order``: which samples a run reads when, and whether a run has read those."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.data_pipeline.data_sampling import Consumed, DataSampler
from penstock.data_pipeline.data_sampling.entry_points import Progress
from penstock.data_pipeline.datasets import Corpora
from penstock.runtime.checkpoint import Checkpoint
from penstock.runtime.config import TrainConfig, load_config
from penstock.runtime.engine_state import find
from penstock.runtime.feed import Feed
from penstock.runtime.preparation import open_training_data, training_feed, training_order
from penstock.runtime.run_directory import CHECKPOINTS_NAME, CONFIG_NAME


@dataclass(frozen=True)
class Account:
    """What a run had read at one of its checkpoints, beside what its order says.

    Attributes:
        step: Steps completed.
        samples: Samples consumed.
        entered: Samples that the ranks entered in their account.
        digest: The account's digest.
        expected: The digest of the order's samples at positions 0 to ``samples - 1``.
    """

    step: int
    samples: int
    entered: int
    digest: str
    expected: str

    @property
    def proved(self) -> bool:
        """Whether the run has read exactly what its order says."""
        return self.entered == self.samples and self.digest == self.expected


def run_order(
    source: Path, overrides: Sequence[str] = (), *, progress: Progress | None = None
) -> tuple[TrainConfig, DataSampler, Feed]:
    """The order of a run's samples, and what each step reads of it.

    Args:
        source: A configuration, or a run's directory. The data must be named in it by ``data.train``.
        overrides: ``section.key=value`` texts.
        progress: Told how far the sorting of a curriculum's samples is.

    Raises:
        ValueError: The configuration is wrong or names no data.
    """
    config = load_config(source / CONFIG_NAME if source.is_dir() else source, overrides)
    dataset = open_training_data(config)
    if dataset is None:
        raise ValueError(f"{source}: the order depends on the data, but data.train names none")
    order = training_order(config, dataset, progress=progress)
    checkpoint = _newest(source)
    if checkpoint is not None and order.paced:
        _take_log(order, checkpoint)
    return config, order, training_feed(config, order)


def verify_run(run: Path, overrides: Sequence[str] = ()) -> list[Account]:
    """Compare what a run has read, by the account in its newest checkpoint, with what its configuration's order says.

    Args:
        run: The run's directory.
        overrides: ``section.key=value`` texts, where the data has moved for example.

    Raises:
        ValueError: There is no complete checkpoint, or it is of another order.
    """
    checkpoint = find(run / CHECKPOINTS_NAME)
    _, order, feed = run_order(run, overrides)
    state = _take_log(order, checkpoint)
    expected, done, found = Consumed(), 0, []
    for entry in state["consumed"]:
        samples = int(entry["samples"])
        expected.add(Consumed.of(partial(_samples, order, feed), done, samples))
        done = samples
        found.append(Account(int(entry["step"]), samples, int(entry["count"]), entry["digest"], expected.digest))
    return found


def rows(order: DataSampler, feed: Feed, start: int, stop: int) -> list[tuple[int | str, ...]]:
    """The samples that a run consumes as its ``start``-th to ``stop - 1``-th: number, position, place, sample.

    The position is the sampler's; the place is that in the order before anything is skipped. Of a mixture the sample
    counts from its corpus' first, whose name follows.
    """
    positions = feed.positions(start, stop).tolist()
    samples = order.sample_at(np.array(positions, dtype=np.int64)).tolist()
    places = order.place_at(np.array(positions, dtype=np.int64)).tolist()
    if not isinstance(order.data, Corpora):
        return list(zip(range(start, stop), positions, places, samples, strict=True))
    corpora = order.data
    found: list[tuple[int | str, ...]] = []
    for number, position, place, sample in zip(range(start, stop), positions, places, samples, strict=True):
        corpus = corpora.corpus_of(sample)
        found.append((number, position, place, sample - corpora.starts[corpus], corpora.names[corpus]))
    return found


def _samples(order: DataSampler, feed: Feed, consumed: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The samples that a run consumes, by a stretch of their numbers."""
    return order.sample_at(feed.positions(int(consumed[0]), int(consumed[-1]) + 1))


def _newest(run: Path) -> Checkpoint | None:
    return find(run / CHECKPOINTS_NAME) if (run / CHECKPOINTS_NAME).is_dir() else None


def _take_log(order: DataSampler, checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's state, after the order has taken over what it says of births."""
    state = checkpoint.read_state()
    if state["order"] is None:
        raise ValueError(f"{checkpoint.path}: the run read no training data of its own, so there is no order to verify")
    order.load_order_state(state["order"], consumed=int(state["progress"]["samples"]))
    return state
