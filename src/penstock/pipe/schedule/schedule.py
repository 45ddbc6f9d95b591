"""A pipeline schedule as data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from penstock.pipe.schedule.action import BACKWARD, COMPUTE_OPS, FORWARD, WEIGHT_GRADIENT, Action

_NO_COMPUTE: Final = re.compile(r"\s*([0-9]+(UNSHARD|RESHARD|REDUCE_GRAD))?\s*")


class ScheduleError(ValueError):
    """A schedule cannot be run; the message names the rank, the action and why."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which rank computes what, in which order.

    Only compute actions are listed; :func:`~penstock.pipe.schedule.communicate.place_communication` adds the sends and
    receives, :func:`~penstock.pipe.schedule.validate.validate` proves that the whole can run.

    Attributes:
        name: For messages and file names.
        num_stages: Stages of the model, in order; a rank may hold several.
        micro_batches: Micro-batches per step and pipeline.
        ranks: For each pipeline rank, its compute actions in order.
        placement: For each stage, the pipeline rank that holds it.
        forward_only: True when nothing runs backward (evaluation and prediction).
    """

    name: str
    num_stages: int
    micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]
    forward_only: bool = False

    def __post_init__(self) -> None:
        check_sizes(self.num_stages, self.micro_batches)
        if len(self.placement) != self.num_stages:
            raise ScheduleError(
                f"schedule {self.name!r}: placement lists {len(self.placement)} stages, expected {self.num_stages}"
            )
        held = set(self.placement)
        if held != set(range(len(self.ranks))):
            raise ScheduleError(
                f"schedule {self.name!r}: its placement puts stages on ranks {sorted(held)}, but actions are listed "
                f"for ranks 0..{len(self.ranks) - 1}; every rank must hold at least one stage"
            )

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks that take part."""
        return len(self.ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds, in model order."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    def peak_activations(self) -> tuple[int, ...]:
        """For each rank, the most micro-batches, counted once per stage, whose activations it keeps at a time.

        Kept from F to the end of B, or of W where the backward pass is split: weight gradients need them too. Without
        backward passes nothing is kept beyond the forward itself.
        """
        if self.forward_only:
            return tuple(min(1, len(actions)) for actions in self.ranks)
        return tuple(_peak(actions) for actions in self.ranks)

    def to_text(self) -> str:
        """One line per rank, compute actions separated by commas, as PyTorch's pipelining reads them."""
        return "".join(",".join(map(str, actions)) + "\n" for actions in self.ranks)

    @classmethod
    def from_text(cls, text: str, name: str = "custom") -> "Schedule":
        """Read :meth:`to_text`'s form; numbers of stages and micro-batches and the placement follow from the actions.

        Empty cells, with which PyTorch marks idle time, are skipped, and so are its cells that say when to gather or
        reduce parameters (``0UNSHARD``, ``0RESHARD``, ``0REDUCE_GRAD``): here that is the engine's affair.

        Raises:
            ScheduleError: No actions, a communication action, or a stage that appears on two ranks or on none.
            ValueError: A cell that is no action.
        """
        lines = text.strip().splitlines()
        ranks = tuple(
            tuple(Action.parse(cell) for cell in line.split(",") if not _NO_COMPUTE.fullmatch(cell)) for line in lines
        )
        return cls.from_ranks(ranks, name)

    @classmethod
    def from_ranks(cls, ranks: Sequence[Sequence[Action]], name: str = "custom") -> "Schedule":
        """A schedule from each rank's compute actions; the rest follows from them. Errors as for :meth:`from_text`."""
        holders: dict[int, int] = {}
        micro_batches = 0
        forward_only = True
        for rank, actions in enumerate(ranks):
            for action in actions:
                if action.op not in COMPUTE_OPS:
                    raise ScheduleError(
                        f"schedule {name!r}, rank {rank}, action {action}: only compute actions are listed; "
                        "sends and receives are placed by place_communication"
                    )
                holder = holders.setdefault(action.stage, rank)
                if holder != rank:
                    raise ScheduleError(
                        f"schedule {name!r}, rank {rank}, action {action}: "
                        f"stage {action.stage} is on rank {holder} already"
                    )
                micro_batches = max(micro_batches, action.micro_batch + 1)
                forward_only = forward_only and action.op == FORWARD
        num_stages = max(holders, default=-1) + 1
        missing = [stage for stage in range(num_stages) if stage not in holders]
        if missing:
            raise ScheduleError(f"schedule {name!r}: no rank has an action of stage {missing[0]}")
        placement = tuple(holders[stage] for stage in range(num_stages))
        return cls(name, num_stages, micro_batches, tuple(map(tuple, ranks)), placement, forward_only)


def _peak(actions: Sequence[Action]) -> int:
    kept = peak = 0
    for _, op, _ in actions:
        if op == FORWARD:
            kept += 1
            peak = max(peak, kept)
        elif op in (BACKWARD, WEIGHT_GRADIENT):
            kept -= 1
    return peak


def check_sizes(num_stages: int, micro_batches: int) -> None:
    """Refuse fewer than one stage or micro-batch, with a :class:`ScheduleError`."""
    if num_stages < 1:
        raise ScheduleError(f"a schedule needs at least 1 stage, got {num_stages}")
    if micro_batches < 1:
        raise ScheduleError(f"a schedule needs at least 1 micro-batch, got {micro_batches}")
