"""What an engine is put together from, and where its run stands."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from penstock._core.meter import Meter
from penstock._core.protocols import GradientExchange
from penstock._core.waiting import Watcher
from penstock.compression import LocalUpdates
from penstock.data_pipeline.data_sampling import Consumed, DataSampler
from penstock.pipe.engine import PipelineEngine
from penstock.pipe.groups import PipeGroups
from penstock.pipe.local_stages import AnyStages
from penstock.pipe.module import PipelineModule
from penstock.runtime.batches import Collate, Cut, collate_samples
from penstock.runtime.config import TrainConfig
from penstock.runtime.dropping import Dropping
from penstock.runtime.feed import Feed
from penstock.runtime.ledger_rates import Rates
from penstock.runtime.loss_scaler import LossScaler
from penstock.runtime.lr_schedule import LRSchedule
from penstock.runtime.post_validation import PostValidation
from penstock.runtime.process import Process
from penstock.runtime.shared_parameters import SharedParameters


@dataclass
class Progress:
    """Where the run stands; what a checkpoint's state begins with.

    Attributes:
        step: Optimizer steps completed.
        samples: Samples consumed: the position ``k`` in the run's order at which the next step begins.
        tokens: Tokens consumed.
        layer_tokens: Tokens that the blocks computed, summed over them; 0 without dropping.
        earlier: What the run spent on other layouts before it was resumed on this one; None if it never was.
        read: Which samples this rank has read and trained on since it was started or resumed.
        read_before: The same for all ranks before it was resumed.
        accounts: What all ranks had read at each checkpoint: step, samples, count and digest.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    layer_tokens: int = 0
    earlier: dict[str, Any] | None = None
    read: Consumed = field(default_factory=Consumed)
    read_before: Consumed = field(default_factory=Consumed)
    accounts: list[dict[str, Any]] = field(default_factory=list)

    def account(self, parts: Iterable[Mapping[str, Any]]) -> None:
        """Note what all ranks have read, of which ``parts`` are the states, at this step."""
        total = Consumed()
        total.add(self.read_before)
        for part in parts:
            total.add(Consumed.from_state(part))
        if not self.accounts or self.accounts[-1]["step"] != self.step:
            self.accounts.append({"step": self.step, "samples": self.samples, **total.state_dict()})


@dataclass(frozen=True)
class Parts:
    """What :func:`penstock.initialize` puts together for an :class:`Engine`."""

    config: TrainConfig
    process: Process
    watcher: Watcher
    meter: Meter
    groups: PipeGroups
    stage: AnyStages
    module: PipelineModule | None
    shared: SharedParameters
    pipeline: PipelineEngine
    exchange: GradientExchange
    optimizer: Optimizer
    local_updates: LocalUpdates | None
    schedule: LRSchedule | None
    cut: Cut
    feed: Feed
    dropping: Dropping | None
    rates: Rates
    scaler: LossScaler | None = None
    post_validation: PostValidation | None = None
    training_data: Any = None
    order: DataSampler | None = None
    collate: Collate = collate_samples
