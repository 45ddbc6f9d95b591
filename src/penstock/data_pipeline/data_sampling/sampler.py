"""The sampler: data in, an order that is a function, batches out."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from penstock.data_pipeline.configuration import validate_config
from penstock.data_pipeline.data_sampling.batch_iterator import BatchIterator
from penstock.data_pipeline.data_sampling.chunks import ChunkedOrder
from penstock.data_pipeline.data_sampling.config import SamplingConfig
from penstock.data_pipeline.data_sampling.entry_points import Progress
from penstock.data_pipeline.data_sampling.mixture import MixtureOrder
from penstock.data_pipeline.data_sampling.order import IntArray, digest_of
from penstock.data_pipeline.data_sampling.pacing import Pacer
from penstock.data_pipeline.data_sampling.skips import SkipRanges
from penstock.data_pipeline.data_sampling.source import open_source
from penstock.data_pipeline.data_sampling.strategies import Strategy, build_strategy
from penstock.data_pipeline.data_sampling.transforms import build_transforms

_STATE_VERSION: Final = 2


class DataSampler(Sampler[list[int]]):
    """Chooses which samples a run sees, and when.

    The sample at position ``k`` of the run is a pure function of the configuration and ``k`` (:meth:`sample_at`), so
    the global order is the same whatever the number of replicas, loader workers or restarts. As a batch sampler::

        sampler = DataSampler(dataset, {"strategy": "random", "batch_size": 32, "epochs": 2})
        for batch in DataLoader(dataset, batch_sampler=sampler, num_workers=4):
            ...  # train on it
            sampler.mark_trained()

    A DataLoader's workers run ahead of the training, so what the iterator has handed out says nothing about what was
    trained on: only :meth:`mark_trained` moves the position that :meth:`state_dict` saves and that the next iteration
    starts from.

    Args:
        data_source: A list, array or tensor, a pandas or Arrow table, a torch ``Dataset`` (anything with ``__len__``
            and ``__getitem__``), or a path to ``.bin/.idx``, Parquet, Arrow, JSON lines or ``.npy``. For a mixture a
            dictionary of these by name, which become one dataset, ``data``.
        sampling_config: A dictionary or a :class:`SamplingConfig`, which lists the keys.
        progress: Called with what is being done, how many samples are done and how many there are, while the samples of
            a large curriculum are sorted.

    Attributes:
        config: The checked configuration.
        data: The opened data source.
        num_samples: Length of the run, in samples.
        transforms: What :meth:`preprocess_data` does; workers of a loader can be given it without the sampler.
        epoch_size: Length of an epoch, in samples. For a curriculum: the samples that it ever admits.

    Raises:
        ValueError: The configuration is wrong or does not fit the data.
    """

    def __init__(
        self,
        data_source: Any,
        sampling_config: Mapping[str, Any] | SamplingConfig | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        self.config = validate_config(SamplingConfig, {} if sampling_config is None else sampling_config, "sampling")
        self.transforms = build_transforms(self.config.transforms)
        self._source = data_source
        self.data = self.load_data()
        if len(self.data) == 0:
            raise ValueError("the data source is empty; there is nothing to sample")
        self._strategy: Strategy = build_strategy(self.config, self.data, progress)
        self._skips = SkipRanges(self.config.skip_ranges)
        self._order = self._strategy.order
        self.epoch_size = self._order.epoch_size
        self.num_samples = self.config.num_samples or (self.config.epochs or 1) * self.epoch_size
        self.check_length(self.num_samples)
        self._check_last_batch(0)
        self._consumed = 0
        self._batches = 0
        self._handed_out = 0
        self._fingerprint: str | None = None
        self._samples = ChunkedOrder(self._order, self._skips)

    # The three steps of the pipeline

    def load_data(self) -> Any:
        """Open the data source.

        Returns:
            A map-style dataset: ``data[i]`` is a sample and ``len(data)`` their number.

        Raises:
            ValueError: The source is not understood, or can only be iterated.
        """
        return open_source(self._source, self.config)

    def apply_sampling(self, data: Any) -> list[Any]:
        """The samples of the whole run, in order, as a list.

        Args:
            data: What :meth:`load_data` returned, or another dataset of the same length.

        Raises:
            ValueError: It has another length than the data that the order was made for.
        """
        if len(data) != len(self.data):
            raise ValueError(f"the order was made for {len(self.data)} samples, but the data has {len(data)}")
        return [data[int(index)] for index in self.sample_at(np.arange(self.num_samples))]

    def preprocess_data(self, data: Any) -> list[Any]:
        """Apply the configured transforms, in their order, to a sequence of samples."""
        return self.transforms(data)

    def execute_data_pipeline(self) -> list[Any]:
        """Load, sample and preprocess: the samples of the whole run, in order, transformed."""
        return self.preprocess_data(self.apply_sampling(self.load_data()))

    # The order

    def sample_at(self, k: npt.ArrayLike) -> IntArray:
        """Which samples stand at positions ``k`` of the run's global order.

        Args:
            k: Integers of any shape, each at least 0; positions beyond the run go on epoch after epoch.

        Returns:
            Indices into the dataset, int64, of the same shape.

        Raises:
            ValueError: A position is negative or not an integer.
        """
        return self._samples(k)

    def place_at(self, k: npt.ArrayLike) -> IntArray:
        """The places of positions ``k`` in the order before anything is skipped: what ``skip_ranges`` is counted in.

        Args:
            k: Integers of any shape, each at least 0.

        Returns:
            int64, of the same shape; ``k`` itself where nothing is skipped before it.
        """
        return self._skips.places(np.asarray(k, dtype=np.int64))

    def difficulty_at(self, k: int) -> dict[str, float]:
        """The difficulty of each metric that the schedules allow at position ``k``; empty without a curriculum.

        The pool grows at 256 births at most; a schedule with more changes is followed at that spacing, from below. Once
        a curriculum that is only a warm-up has ended there is no difficulty any more.
        """
        if k < 0:
            raise ValueError(f"positions count from 0, got {k}")
        strategy = self._strategy
        if strategy.curriculum is None:
            return {}
        # Skipped places keep their time in the schedule.
        step = int(self._skips.places(np.array([k], dtype=np.int64))[0]) // self.config.batch_size
        if strategy.until_step is not None and step >= strategy.until_step:
            return {}
        step = strategy.curriculum.schedule_step(step)
        return {name: schedule.get_difficulty(step) for name, schedule in strategy.schedulers.items()}

    @property
    def paced(self) -> bool:
        """Whether a curriculum waits for validation losses; see :meth:`report_validation`."""
        return self._pacer is not None

    @property
    def _pacer(self) -> Pacer | None:
        return None if self._strategy.curriculum is None else self._strategy.curriculum.pacer

    def report_validation(self, loss: float, *, step: int | None = None) -> bool:
        """Tell a paced curriculum a validation loss; every replica reports the same.

        Args:
            loss: Mean loss on held-out data.
            step: Global batches trained on so far; None takes those marked as trained.

        Returns:
            Whether another block of samples will enter at the next multiple of ``pacing.every`` steps.

        Raises:
            ValueError: The curriculum is not paced, the loss is not finite, or a loader has run so far ahead that it
                has handed out batches from beyond that step.
        """
        curriculum, pacer = self._strategy.curriculum, self._pacer
        if curriculum is None or pacer is None:
            raise ValueError("only a curriculum with pacing follows the validation loss; set curriculum.pacing")
        if not pacer.report(self._batches if step is None else step, loss):
            return False
        first = pacer.births[-1] * self.config.batch_size
        if self._handed_out > first:
            raise ValueError(
                f"the curriculum grows at position {first}, but batches up to position {self._handed_out} were handed "
                f"out already; raise pacing.every (now {pacer.config.every} steps) above what the loader prefetches"
            )
        self._births_changed()
        return True

    def _births_changed(self) -> None:
        if self._strategy.curriculum is not None:
            self._strategy.curriculum.births_changed()
            self._samples.forget()

    @property
    def num_excluded(self) -> int:
        """Samples that the run never sees, however long: above a curriculum's largest difficulty, or of weight 0."""
        return self._strategy.excluded

    @property
    def mixture(self) -> MixtureOrder | None:
        """The mixture's own order: its shares and counts; None of a single dataset."""
        return self._strategy.mixture

    def check_length(self, samples: int) -> None:
        """Check that the data lasts for so many samples: a corpus of a mixture may not repeat.

        Raises:
            ValueError: It does not.
        """
        if self._strategy.mixture is not None and samples:
            last = np.array([samples - 1], dtype=np.int64)
            self._strategy.mixture.check_length(int(self._skips.places(last)[0]) + 1)

    # The batch sampler

    def _check_last_batch(self, start: int) -> None:
        """Check that the batches from position ``start`` can be shared among the replicas, the last one too."""
        rest = (self.num_samples - start) % self.config.batch_size
        if rest % self.config.num_replicas and not self.config.drop_last:
            raise ValueError(
                f"the last global batch has {rest} samples, which {self.config.num_replicas} replicas cannot share "
                f"equally; set drop_last, or a num_samples that is a multiple of {self.config.num_replicas}"
            )
        if start == 0 and self.num_samples < self.config.batch_size and self.config.drop_last:
            raise ValueError(
                f"the run has {self.num_samples} samples, less than one batch of {self.config.batch_size}, and "
                "drop_last leaves none; lower batch_size or lengthen the run"
            )

    def positions_at(self, k: int) -> range:
        """The positions of this replica's part of the global batch that starts at position ``k``."""
        size = min(self.config.batch_size, self.num_samples - k)
        share = size // self.config.num_replicas
        start = k + self.config.rank * share
        return range(start, start + share)

    def __iter__(self) -> Iterator[list[int]]:
        """This replica's sample indices, a list for each global batch, from the first batch not trained on.

        The iterator has a ``state_dict`` of its own, by which a stateful loader remembers the batches that it has given
        to the training, whatever its workers have prefetched.
        """
        return BatchIterator(self, self._consumed)

    def batch_at(self, k: int) -> list[int] | None:
        """This replica's sample indices in the global batch that starts at position ``k``; None at the run's end."""
        if k >= self._end:
            return None
        self._handed_out = self.next_position(k)
        positions = self.positions_at(k)
        batch: list[int] = self.sample_at(np.arange(positions.start, positions.stop)).tolist()
        return batch

    def next_position(self, k: int) -> int:
        """Where the batch after the one at position ``k`` starts."""
        return min(k + self.config.batch_size, self.num_samples)

    def __len__(self) -> int:
        """Batches of the whole run, those already trained on included."""
        return self._batches + self.batches_left

    @property
    def batches_left(self) -> int:
        """Batches from the first not trained on."""
        return -(-max(0, self._end - self._consumed) // self.config.batch_size)

    @property
    def _end(self) -> int:
        """The position after the last batch."""
        if self.config.drop_last:
            # From where the run stands: it may have been consumed up to a place that is no multiple of the batch size.
            left = max(0, self.num_samples - self._consumed)
            return self._consumed + left // self.config.batch_size * self.config.batch_size
        return self.num_samples

    # State

    @property
    def consumed(self) -> int:
        """Samples trained on, over all replicas: the position at which the next iteration starts."""
        return self._consumed

    def mark_trained(self, batches: int = 1) -> None:
        """Count global batches as trained on, in the order in which the sampler gave them.

        Raises:
            ValueError: There are not that many batches left.
        """
        if not 0 <= batches <= self.batches_left:
            raise ValueError(f"{batches} batches were marked as trained on, but {self.batches_left} are left")
        self._consumed = min(self._consumed + batches * self.config.batch_size, self.num_samples)
        self._batches += batches

    def set_consumed(self, consumed: int) -> None:
        """Set how many samples of the run were trained on; the next iteration starts there.

        Raises:
            ValueError: It is negative or beyond the run.
        """
        if not 0 <= consumed <= self.num_samples:
            raise ValueError(f"consumed must lie in 0..{self.num_samples} (num_samples), got {consumed}")
        self._check_last_batch(int(consumed))
        self._consumed = int(consumed)
        self._batches = -(-self._consumed // self.config.batch_size)

    def fingerprint(self) -> str:
        """A digest of all that the order depends on: strategy, seed, schedule, metrics and the number of samples.

        How batches are shared among replicas, where the run ends and which later stretches it skips are not part of it:
        they may change on resuming.
        """
        if self._fingerprint is None:
            self._fingerprint = digest_of(len(self.data), self._order.digest())
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as plain values: samples and batches trained on, and what :meth:`order_state` gives."""
        return {"version": _STATE_VERSION, "consumed": self._consumed, "step": self._batches, **self.order_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with any number of replicas.

        Raises:
            ValueError: The state is malformed, or belongs to another order.
        """
        version, consumed, step = (state.get(name) for name in ("version", "consumed", "step"))
        if version != _STATE_VERSION or not isinstance(consumed, int) or not isinstance(step, int) or step < 0:
            raise ValueError(
                f"not a sampler's state of version {_STATE_VERSION}: version={version!r}, consumed={consumed!r}, "
                f"step={step!r}"
            )
        self.load_order_state(state, consumed=consumed)
        self.set_consumed(consumed)
        self._batches = step

    def order_state(self) -> dict[str, Any]:
        """What a run's order depends on besides its position: fingerprint, skipped ranges, births of a paced pool."""
        pacer = self._pacer
        return {
            "fingerprint": self.fingerprint(),
            "skip_ranges": [list(pair) for pair in self._skips.ranges],
            "pacing": None if pacer is None else pacer.state_dict(),
        }

    def load_order_state(self, state: Mapping[str, Any], *, consumed: int) -> None:
        """Check that a run that stands at position ``consumed`` can go on in this order, and take its log over.

        Raises:
            ValueError: It was another order, or passed over other ranges up to there.
        """
        if state.get("fingerprint") != self.fingerprint():
            raise ValueError(
                f"the state belongs to another order (fingerprint {state.get('fingerprint')}, here "
                f"{self.fingerprint()}): the dataset, strategy, seed or curriculum changed since it was saved; restore "
                "them, or call set_consumed to start the new order at a position of your choice"
            )
        then = SkipRanges([(int(first), int(end)) for first, end in state.get("skip_ranges") or ()])
        passed, here = then.begun_before(consumed), self._skips.begun_before(consumed)
        if passed != here:
            raise ValueError(
                f"by position {consumed} the run had passed over skip_ranges {list(passed)}, but the configuration "
                f"says {list(here)}; keep those that the run has reached, and add only later ones"
            )
        if self._pacer is not None:
            self._pacer.load_state_dict(state.get("pacing") or {})
            self._births_changed()
