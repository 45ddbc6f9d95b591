"""A pipeline schedule as data."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from penstock.pipe.schedule.action import COMPUTE_OPS, Action
from penstock.pipe.schedule.actions import F_CODE, Actions

_NO_COMPUTE: Final = re.compile(r"\s*([0-9]+(UNSHARD|RESHARD|REDUCE_GRAD))?\s*")

_OVERLAPPED: Final = re.compile(r"\s*\(([^()]*)\)OVERLAP_F_B\s*")


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
        ranks: For each pipeline rank, its compute actions in order. Any sequences of :class:`Action` may be given.
        placement: For each stage, the pipeline rank that holds it.
        forward_only: True when nothing runs backward (evaluation and prediction).
        slices: Pieces along the sequence into which each micro-batch is cut, each an action of its own. Then an
            action's number is ``micro_batch * slices + slice``. In each stage the slices of a micro-batch run forward
            in order (causal attention needs the earlier ones) and backward in reverse order (their gradients).
    """

    name: str
    num_stages: int
    micro_batches: int
    ranks: tuple[Actions, ...]
    placement: tuple[int, ...]
    forward_only: bool = False
    slices: int = 1

    def __post_init__(self) -> None:
        check_sizes(self.num_stages, self.micro_batches, slices=self.slices)
        # Frozen: lists given in another form are brought into this one once, here.
        object.__setattr__(self, "ranks", tuple(_as_arrays(self.name, r, a) for r, a in enumerate(self.ranks)))
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

    @property
    def units(self) -> int:
        """How many actions of each op a stage has: micro-batches times slices."""
        return self.micro_batches * self.slices

    @property
    def num_actions(self) -> int:
        """Compute actions of all ranks."""
        return sum(map(len, self.ranks))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds, in model order."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    def peak_activations(self) -> tuple[int, ...]:
        """For each rank, the most micro-batches (or slices), counted once per stage, whose activations it keeps.

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
    def from_text(cls, text: str, name: str = "custom", *, slices: int = 1) -> "Schedule":
        """Read :meth:`to_text`'s form; numbers of stages and micro-batches and the placement follow from the actions.

        The form does not say whether actions are slices of micro-batches; ``slices`` does.

        Empty cells, with which PyTorch marks idle time, are skipped, and so are its cells that say when to gather or
        reduce parameters (``0UNSHARD``, ``0RESHARD``, ``0REDUCE_GRAD``): here that is the engine's affair. A pair to be
        overlapped, ``(2F0;1B3)OVERLAP_F_B``, is read as the two actions one after the other.

        Raises:
            ScheduleError: No actions, a communication action, or a stage that appears on two ranks or on none.
            ValueError: A cell that is no action.
        """
        lines = text.strip().splitlines()
        ranks = tuple(tuple(Action.parse(cell) for cell in _cells(line)) for line in lines)
        return cls.from_ranks(ranks, name, slices=slices)

    @classmethod
    def from_ranks(cls, ranks: Iterable[Sequence[Action]], name: str = "custom", *, slices: int = 1) -> "Schedule":
        """A schedule from each rank's compute actions; the rest follows from them. Errors as for :meth:`from_text`."""
        lists = tuple(_as_arrays(name, rank, actions) for rank, actions in enumerate(ranks))
        holders: dict[int, int] = {}
        for rank, actions in enumerate(lists):
            for stage in np.unique(actions.stages).tolist():
                holder = holders.setdefault(stage, rank)
                if holder != rank:
                    action = actions[int(np.argmax(actions.stages == stage))]
                    raise ScheduleError(
                        f"schedule {name!r}, rank {rank}, action {action}: stage {stage} is on rank {holder} already"
                    )
        num_stages = len(holders)
        missing = next((stage for stage in range(num_stages) if stage not in holders), None)
        if missing is not None:
            raise ScheduleError(f"schedule {name!r}: no rank has an action of stage {missing}")
        placement = tuple(holders[stage] for stage in range(num_stages))
        units = max((int(actions.units.max()) + 1 for actions in lists if len(actions)), default=0)
        if slices > 1 and units % slices:
            raise ScheduleError(f"schedule {name!r}: its {units} units are no multiple of {slices} slices")
        forward_only = not any(np.any(actions.ops != F_CODE) for actions in lists)
        return cls(name, num_stages, units // max(1, slices), lists, placement, forward_only, slices)


def _cells(line: str) -> Iterator[str]:
    for cell in line.split(","):
        pair = _OVERLAPPED.fullmatch(cell)
        if pair:
            yield from pair[1].split(";")
        elif not _NO_COMPUTE.fullmatch(cell):
            yield cell


def _as_arrays(name: str, rank: int, actions: Sequence[Action]) -> Actions:
    if not isinstance(actions, Actions):
        for action in actions:
            if action.op not in COMPUTE_OPS:
                raise ScheduleError(
                    f"schedule {name!r}, rank {rank}, action {action}: a schedule lists compute actions only; "
                    "sends and receives are placed by place_communication"
                )
    try:
        return Actions.of(actions)
    except OverflowError:
        raise ScheduleError(f"schedule {name!r}, rank {rank}: a stage or micro-batch is beyond 2**31 - 1") from None


def _peak(actions: Actions) -> int:
    if not len(actions):
        return 0
    change = np.array([1, -1, 0, -1], dtype=np.int32)[actions.ops]
    return max(0, int(np.cumsum(change, dtype=np.int32).max()))


def check_sizes(num_stages: int, micro_batches: int, chunks: int = 1, slices: int = 1) -> None:
    """Refuse fewer than one stage, micro-batch, chunk or slice, with a :class:`ScheduleError`."""
    sizes = {"stage": num_stages, "micro-batch": micro_batches, "chunk": chunks, "slice": slices}
    for what, size in sizes.items():
        if size < 1:
            raise ScheduleError(f"a schedule needs at least 1 {what}, got {size}")
